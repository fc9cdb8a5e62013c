"""What `initialize_distributed` and `create_mesh` refuse."""

import re
import socket

import jax
import pytest
from support.processes import free_port

from moe_jax import ParallelConfig
from moe_jax.parallel import create_mesh, initialize_distributed, parallel_of


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(num_processes=2), "go together; missing: coordinator_address, process_id"),
        (dict(coordinator_address="a:1", num_processes=2, process_id=2), r"in \[0, num_processes=2\), got 2"),
        (dict(coordinator_address="a", num_processes=2, process_id=0), "must be host:port, got 'a'"),
        (dict(coordinator_address="a:b", num_processes=2, process_id=0), "must be host:port, got 'a:b'"),
        (dict(coordinator_address="a:65536", num_processes=2, process_id=0), "must be host:port, got 'a:65536'"),
        (dict(coordinator_address="1234", num_processes=2, process_id=0), "must be host:port, got '1234'"),
    ],
    ids=str,
)
def test_processes_that_cannot_be_joined_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        initialize_distributed(**given)


@pytest.mark.parametrize("host", ["localhost", "absent.invalid"])
def test_a_process_that_does_not_reach_the_first_one_says_where_and_why_before_jax_waits(host, monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **timeouts: pytest.fail("jax waits"))
    address, said = f"{host}:{free_port()}", []
    with pytest.raises(TimeoutError, match=rf"^process 0 cannot be reached at {address} \(.+\), after 1 seconds; "):
        initialize_distributed(address, 2, 1, initialization_timeout_seconds=1, on_wait=said.append)
    (remark,) = said
    assert remark.startswith(f"waiting for process 0 at {address} (")


@pytest.mark.parametrize("is_late", [True, False])
def test_a_process_waits_for_the_first_one_and_says_so_only_if_it_is_late(is_late, monkeypatch):
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **timeouts: joined.append(given))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address, said = f"127.0.0.1:{listener.getsockname()[1]}", []
        if not is_late:
            listener.listen()

        def on_wait(remark):
            said.append(remark)
            listener.listen()

        initialize_distributed(address, 2, 1, initialization_timeout_seconds=60, on_wait=on_wait)
    assert joined == [(address, 2, 1)]
    assert len(said) == is_late


def test_the_first_process_waits_for_no_address_and_jax_for_as_long_as_it_is_told(monkeypatch):
    timeouts = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **others: timeouts.append(others))
    initialize_distributed(f"localhost:{free_port()}", 2, 0, initialization_timeout_seconds=7)
    assert timeouts[0]["initialization_timeout"] == 7


def test_a_mesh_has_the_axes_and_sizes_asked_for():
    mesh = create_mesh({"data": 2, "expert": 3})
    assert dict(mesh.shape) == {"data": 2, "expert": 3}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"expert": 0}, "must be positive, got expert=0"),
        ({"expert": 4, "data": 4}, "the mesh expert=4,data=4 needs 16 devices, got 8"),
        (
            {"expert": 16},
            "got 8; XLA_FLAGS=--xla_force_host_platform_device_count=16, set before JAX starts, simulates them",
        ),
    ],
    ids=str,
)
def test_a_mesh_that_the_devices_cannot_make_is_refused(sizes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        create_mesh(sizes)


def test_several_processes_must_use_all_their_devices(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="needs 4 devices, got 8 on 2 processes, which must all be used"):
        create_mesh({"expert": 4})


def test_names_of_axes_say_what_they_split():
    named = parallel_of(create_mesh({"data": 2, "tensor": 2}))
    assert named == ParallelConfig(data_axis="data", tensor_axis="tensor")
    unnamed = parallel_of(create_mesh({"x": 2, "y": 2}))
    assert unnamed == ParallelConfig(expert_axis=("x", "y"))
    with pytest.raises(ValueError, match="got 'x' beside 'data'"):
        parallel_of(create_mesh({"data": 2, "x": 2}))
