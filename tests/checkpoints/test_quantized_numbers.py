"""Decoding of block FP8 and MXFP4: spec 7.2b and 7.8, hf_families 7.1 and 7.2."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.checkpoints.block_fp8 import decode_block_fp8, scale_values
from moe_jax.checkpoints.mxfp4 import decode_mxfp4

BF16 = np.dtype(ml_dtypes.bfloat16)
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def value_of_e4m3(byte):
    """From the definition: sign, four exponent bits with bias 7, three mantissa bits; no infinities, 0x7f is NaN."""
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return np.nan
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def block_fp8_oracle(weights, scales, block):
    result = np.empty(weights.shape, np.float64)
    for n, k in np.ndindex(weights.shape):
        result[n, k] = value_of_e4m3(int(weights[n, k])) * float(scales[n // block[0], k // block[1]])
    return result


@pytest.mark.parametrize(
    ("shape", "block"), [((6, 8), (2, 4)), ((7, 9), (3, 4)), ((1, 1), (128, 128)), ((130, 5), (128, 2))]
)
@pytest.mark.parametrize("dtype", [np.float32, BF16], ids=["float32", "bfloat16"])
def test_block_fp8_multiplies_by_scale_inv_of_the_block_ragged_or_not(shape, block, dtype, rng):
    weights = rng.integers(0, 256, shape, np.uint8)
    scales = rng.uniform(0.01, 3, (-(-shape[0] // block[0]), -(-shape[1] // block[1]))).astype(np.float32)
    out = np.empty(shape, dtype)
    decode_block_fp8(weights, scales, block, out)
    # A float32 product of a 4-bit and a 24-bit significand is rounded once, and once more to bfloat16.
    expected = block_fp8_oracle(weights, scales, block).astype(np.float32).astype(dtype)
    np.testing.assert_array_equal(out.astype(np.float32), expected.astype(np.float32))


def test_block_fp8_rows_in_the_middle_of_a_matrix_get_their_own_scales(rng):
    weights = rng.integers(0, 0x7F, (23, 6), np.uint8)
    scales = rng.uniform(0.5, 2, (5, 2)).astype(np.float32)
    expected = block_fp8_oracle(weights, scales, (5, 4)).astype(np.float32)
    for start, stop in [(0, 23), (4, 6), (5, 10), (7, 22), (22, 23), (9, 9)]:
        out = np.empty((stop - start, 6), np.float32)
        decode_block_fp8(weights[start:stop], scales, (5, 4), out, first_row=start)
        np.testing.assert_array_equal(out, expected[start:stop])


def test_block_fp8_of_many_rows_is_decoded_in_steps(rng, monkeypatch):
    monkeypatch.setattr("moe_jax.checkpoints.block_fp8._STEP_BYTES", 13)  # two rows
    weights = rng.integers(0, 256, (23, 6), np.uint8)
    scales = rng.uniform(0.5, 2, (5, 2)).astype(np.float32)
    out = np.empty((23, 6), np.float32)
    decode_block_fp8(weights, scales, (5, 4), out)
    np.testing.assert_array_equal(out, block_fp8_oracle(weights, scales, (5, 4)).astype(np.float32))


def test_scales_of_e8m0_and_their_raw_bytes_are_powers_of_two():
    stored = np.array([[0, 126, 127, 128, 254]], np.uint8)
    expected = np.array([[2.0**-127, 0.5, 1.0, 2.0, 2.0**127]], np.float32)
    np.testing.assert_array_equal(scale_values(stored), expected)
    np.testing.assert_array_equal(scale_values(stored.view(ml_dtypes.float8_e8m0fnu)), expected)
    assert np.isnan(scale_values(np.array([255], np.uint8))).all()


def pack_mxfp4(codes):
    """[rows, columns] codes -> blocks, element by element from the definition."""
    rows, columns = codes.shape
    blocks = np.zeros((rows, columns // 32, 16), np.uint8)
    for row, column in np.ndindex(codes.shape):
        blocks[row, column // 32, column % 32 // 2] |= codes[row, column] << (4 * (column % 2))
    return blocks


def mxfp4_oracle(codes, exponents):
    signed = np.array([*E2M1, *(-value for value in E2M1)])
    return signed[codes] * np.repeat(2.0 ** (exponents.astype(float) - 127), 32, axis=1)


def test_mxfp4_example_of_spec_7_8():
    blocks = np.zeros((1, 1, 16), np.uint8)
    blocks[0, 0, :4] = [0x10, 0x32, 0x54, 0x76]
    out = np.empty((1, 32), BF16)
    decode_mxfp4(blocks, np.array([[128]], np.uint8), out)
    assert out[0, :8].astype(float).tolist() == [0, 1, 2, 3, 4, 6, 8, 12]
    assert not out[0, 8:].astype(float).any()


@pytest.mark.parametrize("dtype", [np.float32, BF16], ids=["float32", "bfloat16"])
@given(data=st.data())
def test_mxfp4_numbers_packed_by_the_definition_come_back(dtype, data):
    rows, groups = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 3))
    codes = np.array(
        data.draw(st.lists(st.integers(0, 15), min_size=rows * groups * 32, max_size=rows * groups * 32)), np.uint8
    ).reshape(rows, groups * 32)
    exponents = np.array(
        data.draw(st.lists(st.integers(0, 255), min_size=rows * groups, max_size=rows * groups)), np.uint8
    ).reshape(rows, groups)
    expected = mxfp4_oracle(codes, exponents)
    expected[np.abs(expected) >= 2.0**128] *= np.inf  # such as 2 at the largest exponent
    out = np.empty(codes.shape, dtype)
    decode_mxfp4(pack_mxfp4(codes), exponents, out)
    np.testing.assert_array_equal(out.astype(np.float64), expected)


def test_mxfp4_of_many_rows_is_decoded_in_steps(rng, monkeypatch):
    monkeypatch.setattr("moe_jax.checkpoints.mxfp4._STEP_BYTES", 70)  # two rows
    codes, exponents = rng.integers(0, 16, (7, 64), np.uint8), rng.integers(100, 150, (7, 2), np.uint8)
    out = np.empty(codes.shape, np.float32)
    decode_mxfp4(pack_mxfp4(codes), exponents, out)
    np.testing.assert_array_equal(out, mxfp4_oracle(codes, exponents))


def test_mxfp4_keeps_the_sign_of_zero():
    out = np.empty((1, 32), np.float32)
    decode_mxfp4(pack_mxfp4(np.full((1, 32), 8, np.uint8)), np.array([[127]], np.uint8), out)
    assert np.signbit(out).all()
