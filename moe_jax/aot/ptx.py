"""Control flow of a kernel in PTX: whether, on every way from one instruction to another, something lies between."""

import collections
import dataclasses
import functools
import re
from collections.abc import Collection, Iterator, Sequence

_TOKEN = re.compile(r"[{};]|[^{};]+")
_LABEL = re.compile(r"\s*([\w$]+):")
_BRANCH = re.compile(r"(@!?[%\w]+\s+)?bra(\.uni)?\s+([\w$]+)$")
_DESTINATION = re.compile(r"(?:@!?[%\w]+\s+)?[\w.:]+\s+([^,]+)")
_END = re.compile(r"(ret|exit|trap)\b")
_LINE_DIRECTIVE = re.compile(r"^\s*\.(loc|file|section)\b.*$|//.*$", re.MULTILINE)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\([^)]*\)[^{]*")
_OUTSIDE = -1
"""In place of a block around the outermost one."""
_Known = frozenset[tuple[str, bool]]
"""Predicates whose values are known on a way through the code."""


@dataclasses.dataclass(frozen=True)
class ControlFlow:
    """The statements of a kernel, and which can follow which."""

    statements: tuple[str, ...]
    """Instructions and directives, in the order of the text."""
    successors: tuple[tuple[int, ...], ...]
    """For each statement those that can be next."""

    @classmethod
    def of(cls, ptx: str) -> "ControlFlow":
        """Parse the one kernel of a PTX text.

        Raises:
            ValueError: not exactly one kernel, a branch to a label that does not exist, or a computed branch.
        """
        ptx = _LINE_DIRECTIVE.sub("", ptx)
        entries = list(_ENTRY.finditer(ptx))
        if len(entries) != 1:
            raise ValueError(f"one kernel expected in PTX, found {[entry[1] for entry in entries]}")
        return _Parser().parse(ptx[entries[0].end() :])

    def count(self, instruction: str) -> int:
        """How many statements are this instruction, whatever its modifiers and predicate."""
        return len(self._positions(instruction))

    def repeats_without(self, instruction: str, synchronisation: str, *, predicated: bool = False) -> bool:
        """Whether the instruction can run, and later run again, with no synchronisation between.

        Args:
            instruction: its name, such as "wgmma.mma_async"; modifiers may follow.
            synchronisation: name of what must be on every way from the instruction back to itself.
            predicated: whether a synchronisation under a predicate counts. It doesn't where all threads run it, as it may be
                skipped; it does where one elected thread acts for all.
        """
        stops = set(self._positions(synchronisation, predicated=predicated))
        return any(self._reaches({start}, {start}, stops) for start in self._positions(instruction))

    def reaches_without(
        self, earlier: Sequence[str], later: Sequence[str], between: str, *, leading_to: Sequence[str] = ()
    ) -> bool:
        """Whether one of some instructions can run, and later one of others, with nothing of what must be between.

        Args:
            earlier: names of the first ones; modifiers may follow.
            later: names of the others.
            between: name of what must be on every way from one of the first to one of the others, under no predicate.
            leading_to: if given, only those of the others count from which one of these can be reached, again with nothing of
                what must be between.
        """
        stops = set(self._positions(between, predicated=False))
        targets = self._positions_of(later)
        if leading_to:
            ends = self._positions_of(leading_to)
            targets = {position for position in targets if self._reaches({position}, ends, stops)}
        return self._reaches(self._positions_of(earlier), targets, stops)

    def _positions_of(self, instructions: Sequence[str]) -> set[int]:
        return {position for instruction in instructions for position in self._positions(instruction)}

    def _positions(self, instruction: str, *, predicated: bool = True) -> list[int]:
        predicate = r"(@!?[%\w]+\s+)?" if predicated else ""
        pattern = re.compile(rf"{predicate}{re.escape(instruction)}(?![\w])")
        return [position for position, statement in enumerate(self.statements) if pattern.match(statement)]

    def _reaches(self, starts: Collection[int], targets: Collection[int], stops: Collection[int]) -> bool:
        """Whether there is a way from one of `starts` to one of `targets`, itself perhaps, that passes none of `stops`.

        A way decides each predicate once: it doesn't leave out what one branch guards and take what another one guards by the
        same predicate, unless that was computed anew in between.
        """
        seen, waiting = set(), [state for start in starts for state in self._steps(start, self._known_at(start))]
        while waiting:
            state = waiting.pop()
            if state[0] in targets:
                return True
            if state not in seen and state[0] not in stops:
                seen.add(state)
                waiting.extend(self._steps(*state))
        return False

    def _steps(self, position: int, known: _Known) -> Iterator[tuple[int, _Known]]:
        """What can come after a statement, given the values of some predicates, and the values known there."""
        branch = _BRANCH.match(self.statements[position])
        if branch is None or branch[1] is None:
            written = _DESTINATION.match(self.statements[position])
            kept = known if written is None else frozenset(fact for fact in known if not _names(written[1], fact[0]))
            yield from ((successor, kept) for successor in self.successors[position])
            return
        for successor, taken in zip(self.successors[position], (True, False), strict=False):
            fact = _guard(branch[1], taken)
            if (fact[0], not fact[1]) in known:
                continue
            yield successor, known | {fact} if fact[0] in self._shared_guards else known

    def _known_at(self, position: int) -> _Known:
        """Values of predicates that follow from having come to a statement at all: of the branches right before it."""
        known, visited = set(), {position}
        # To the first statement one comes from outside, too.
        while position and len(before := self._predecessors.get(position, ())) == 1 and before[0] not in visited:
            branch = _BRANCH.match(self.statements[before[0]])
            written = _DESTINATION.match(self.statements[before[0]])
            if branch is not None and branch[1] is not None:
                known.add(_guard(branch[1], self.successors[before[0]][0] == position))
            elif written is not None and any(_names(written[1], name) for name in self._shared_guards):
                break
            position = before[0]
            visited.add(position)
        return frozenset(known)

    @functools.cached_property
    def _predecessors(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for position, successors in enumerate(self.successors):
            for successor in successors:
                found.setdefault(successor, []).append(position)
        return found

    @functools.cached_property
    def _shared_guards(self) -> set[str]:
        """Predicates that guard more than one branch; the values of others need not be remembered."""
        branches = (_BRANCH.match(statement) for statement in self.statements)
        counts = collections.Counter(_guard(branch[1], True)[0] for branch in branches if branch and branch[1])
        return {name for name, count in counts.items() if count > 1}


def _guard(guard: str, taken: bool) -> tuple[str, bool]:
    """A branch's predicate, and its value if the branch is taken or not."""
    name = guard.strip().lstrip("@")
    return name.lstrip("!"), taken != name.startswith("!")


def _names(operand: str, predicate: str) -> bool:
    # Most operands don't contain the name at all, which is seen much sooner.
    return predicate in operand and re.search(rf"(?<![\w%]){re.escape(predicate)}(?!\w)", operand) is not None


class _Parser:
    """Reads statements, labels and blocks. A label is known in its block and in those inside it."""

    def __init__(self) -> None:
        self._statements: list[str] = []
        self._block_of: list[int] = []
        self._parents = [_OUTSIDE]
        self._labels: dict[tuple[int, str], int] = {}

    def parse(self, text: str) -> ControlFlow:
        """The control flow of a body, from its opening brace on; what follows its closing brace is ignored."""
        block, pending, operand_depth = 0, "", 0
        for token in _TOKEN.findall(text):
            if token not in "{};":
                pending += token
                if not operand_depth:
                    pending = self._take_labels(pending, block)
            elif token == ";":
                self._statements.append(" ".join(pending.split()))
                self._block_of.append(block)
                pending = ""
            elif pending.strip():  # the braces of a vector operand
                pending += token
                operand_depth += 1 if token == "{" else -1
            elif token == "{":
                self._parents.append(block)
                block, pending = len(self._parents) - 1, ""
            else:
                block, pending = self._parents[block], ""
                if block == 0:
                    break
        return ControlFlow(tuple(self._statements), tuple(map(self._successors, range(len(self._statements)))))

    def _take_labels(self, text: str, block: int) -> str:
        while label := _LABEL.match(text):
            self._labels[block, label[1]] = len(self._statements)
            text = text[label.end() :]
        return text

    def _successors(self, position: int) -> tuple[int, ...]:
        statement = self._statements[position]
        following = (position + 1,) if position + 1 < len(self._statements) else ()
        if _END.match(statement):
            return ()
        if branch := _BRANCH.match(statement):
            target = self._target(branch[3], self._block_of[position])
            target = (target,) if target < len(self._statements) else ()
            return target + following if branch[1] else target
        if re.match(r"(@!?[%\w]+\s+)?brx", statement):
            raise ValueError(f"computed branches are not understood: {statement}")
        return following

    def _target(self, label: str, block: int) -> int:
        while block != _OUTSIDE:
            if (block, label) in self._labels:
                return self._labels[block, label]
            block = self._parents[block]
        raise ValueError(f"branch to a label that is not there: {label}")
