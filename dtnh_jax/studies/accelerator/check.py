"""Checks updates and rules on JAX's device against an oracle, in one minute."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import dtnh_jax
from dtnh_jax import rules
from dtnh_jax.studies.accelerator import oracle, pairs
from dtnh_jax.studies.accelerator.devices import DTYPES, about, dtype_of
from dtnh_jax.studies.accelerator.pairs import Flat, Pair
from dtnh_jax.studies.accelerator.programs import Found, Program, compile_all, shapes

SCOPES = ("global", "leaf", "unit", "element", "labels")
_NORMS = (1e-3, 0.1, 0.8, 1.0, 1.1, 7.0, 1e3)
_COSINES = (-0.9, -0.6, -0.2, 0.0, 0.2, 0.6, 0.9)
# Errors of an update relative to its two summands: of sums in single precision, and of
# rules whose closed forms lose digits.
_SUMS, _RULES = 3e-6, 1e-4
_TINIEST = float(np.finfo(np.float32).tiny)  # of normal numbers
# Of a number that is rounded to bfloat16 at the end, relative to itself.
_ROUNDING = {"float32": 0.0, "bfloat16": 2.0**-8}


class Subject(NamedTuple):
    """A transformation under test."""

    rule: str
    scope: str
    dtype: str
    shapes: tuple[tuple[int, ...], ...]

    @property
    def title(self) -> str:
        """Start of its lines."""
        return f"{self.rule}, {self.scope}, {self.dtype}"


class Outcome(NamedTuple):
    """One line of the report."""

    title: str
    passed: bool
    detail: str


class Updates:
    """The updates of a compiled transformation for pairs."""

    def __init__(self, subject: Subject, found: Found):
        compiled = found[tuple(map(str, subject))]
        if isinstance(compiled, str):
            raise RuntimeError(compiled)
        self._call, self.subject = compiled.call, subject

    def __call__(self, many: Sequence[Pair]) -> tuple[list[Flat], list[int]]:
        """Returns each update, and how many regularizers were skipped until then."""
        dtype = dtype_of(self.subject.dtype)
        state = _transformation(self.subject).init(
            pairs.leaves(many[0].g, self.subject.shapes, dtype)
        )
        outs, skipped = [], []
        for pair in many:
            data = [pairs.leaves(x, self.subject.shapes, dtype) for x in pair]
            state, (out, count) = self._call(state, data)
            outs.append(out)
            skipped.append(count)
        outs, skipped = jax.device_get((outs, skipped))
        flat = [[np.float64(x).reshape(-1) for x in out] for out in outs]
        return flat, [int(each) for each in skipped]


def run(*, tiny: bool = False, workers: int = 8) -> int:
    """Runs all checks, prints a line for each, and returns 1 if one has failed.

    Args:
      tiny: compare few pairs, in single precision at two scopes.
      workers: number of programs that are compiled at once.
    """
    print(", ".join(f"{key}: {value}" for key, value in about().items()), flush=True)
    count = 12 if tiny else 200
    dtypes, scopes = (DTYPES[:1], SCOPES[:2]) if tiny else (DTYPES, SCOPES)
    known = [name for name in oracle.rules() if hasattr(rules, name)]
    subjects = [
        Subject("dtnh", scope, dtype, pairs.SHAPES)
        for scope in scopes
        for dtype in dtypes
    ]
    baselines = [
        Subject(rule, scope, dtype, pairs.ANGLED)
        for rule in known
        for scope in scopes[:2]
        for dtype in dtypes
    ]
    found: Found = {}
    programs = [_program(each) for each in [*subjects, *baselines]]
    compile_all(programs, found, workers=workers, seconds=600.0)
    outcomes = [
        *(o for each in subjects for o in _guarded(_of_scope, each, found, count)),
        *(o for rule in known for o in _of_weights(rule)),
        *(o for each in baselines for o in _guarded(_of_rule, each, found, count)),
    ]
    for outcome in outcomes:
        word = "passed" if outcome.passed else "FAILED"
        print(f"{word}: {outcome.title}: {outcome.detail}")
    failed = sum(not outcome.passed for outcome in outcomes)
    print(f"{len(outcomes) - failed} passed, {failed} failed", flush=True)
    return int(failed > 0)


def _transformation(subject: Subject) -> Any:
    scope: Any = subject.scope
    if scope == "labels":
        scope = [str(i % 2) for i in range(len(subject.shapes))]
    rule = getattr(rules, subject.rule)
    return dtnh_jax.resolve_conflicts(rule, 1.0, scope=scope)


def _program(subject: Subject) -> Program:
    tx = _transformation(subject)
    like = [
        jax.ShapeDtypeStruct(shape, dtype_of(subject.dtype)) for shape in subject.shapes
    ]

    def function(state, data):
        g, r = data
        updates, state = tx.update(dtnh_jax.GradientPair(g, r), state, g)
        skipped = dtnh_jax.conflict_metrics(state)["skipped"]
        return state, (updates, skipped)

    state = shapes(jax.eval_shape(tx.init, like))
    return Program(tuple(map(str, subject)), function, state, [like, like])


def _guarded(
    checks: Callable[[Updates, int], Iterator[Outcome]],
    subject: Subject,
    found: Found,
    count: int,
) -> list[Outcome]:
    """Returns the outcomes of a subject's checks; an exception is a failed check."""
    try:
        return list(checks(Updates(subject, found), count))
    except Exception as error:  # so that the others are checked
        return [Outcome(subject.title, False, f"{type(error).__name__}: {error}")]


class Joined(NamedTuple):
    """All numbers of many pairs and their updates, concatenated."""

    of: np.ndarray  # the group of each number, no two pairs sharing one
    g: np.ndarray
    r: np.ndarray
    ours: np.ndarray

    def norms(self, values: np.ndarray) -> np.ndarray:
        """Returns the norm in each group."""
        return np.sqrt(oracle.sums(self.of, values * values))


def _joined(subject: Subject, many: Sequence[Pair], outs: list[Flat]) -> Joined:
    of = oracle.groups(subject.shapes, subject.scope)
    step = int(of.max()) + 1
    return Joined(
        np.concatenate([of + i * step for i in range(len(many))]),
        np.concatenate([x for pair in many for x in pair.g]),
        np.concatenate([x for pair in many for x in pair.r]),
        np.concatenate([x for out in outs for x in out]),
    )


def _of_scope(updates: Updates, count: int) -> Iterator[Outcome]:
    """Checks DTNH at one scope: its update is the nearest point, for every pair."""
    subject = updates.subject
    dtype, title = dtype_of(subject.dtype), subject.title
    for name in ("ordinary", "special", "extreme"):
        many = getattr(pairs, name)(1, count, dtype)
        outs, skipped = updates(many)
        joined = _joined(subject, many, outs)
        exact = oracle.nearest(joined.of, joined.g, joined.r)
        worst = _worst(subject, joined, exact)
        detail = f"{count} pairs, at worst {worst:.2f} of the bound"
        passed = worst <= 1 and skipped[-1] == 0
        yield Outcome(f"{title}, {name}", passed, f"{detail}, {skipped[-1]} skipped")
    many = pairs.agreeing(2, count, dtype)
    joined = _joined(subject, many, updates(many)[0])
    once = np.float32(joined.g) + np.float32(joined.r)
    different = int(np.sum(joined.ours != once.astype(dtype).astype(np.float64)))
    detail = f"{count} pairs, {different} numbers differ in a bit"
    yield Outcome(f"{title}, g + r", different == 0, detail)
    if subject.scope != "element":  # which needs no sums
        many = pairs.overflowing(3, count, dtype)
        outs, skipped = updates(many)
        joined = _joined(subject, many, outs)
        exact = _without_overflow(joined, len(many))
        worst = _worst(subject, joined, exact)
        detail = f"{count} pairs, at worst {worst:.2f} of the bound"
        passed = worst <= 1 and skipped[-1] >= count
        yield Outcome(f"{title}, overflow", passed, f"{detail}, {skipped[-1]} counted")


def _worst(subject: Subject, joined: Joined, exact: np.ndarray) -> float:
    """Returns the largest error of a group, relative to its rounding bound."""
    of_g = joined.norms(joined.g)
    size = of_g + joined.norms(joined.r)
    bound = _SUMS * size + _ROUNDING[subject.dtype] * joined.norms(exact)
    # A device may flush each sum on the way that is no normal number: over `||g||^2`
    # that is what the weight of `g` may be off.
    flushed = _TINIEST * oracle.sums(joined.of, np.ones_like(joined.g))
    bound += np.divide(flushed, of_g, out=np.zeros_like(of_g), where=of_g > 0)
    return _largest(joined.norms(joined.ours - exact), bound)


def _largest(errors: np.ndarray, bounds: np.ndarray) -> float:
    """Returns the largest ratio; if a bound is 0, the error must be 0."""
    if not np.all(np.isfinite(errors)):
        return float("inf")
    ratios = errors / np.where(bounds > 0, bounds, 1)
    return float(np.max(np.where(bounds > 0, ratios, np.where(errors > 0, np.inf, 0))))


def _without_overflow(joined: Joined, count: int) -> np.ndarray:
    """Returns the expected updates: `g` alone in each group whose sums overflow."""
    ends = np.cumsum([int(np.prod(shape)) for shape in pairs.SHAPES])
    place = np.arange(len(joined.g)) % (len(joined.g) // count)
    inside = (place >= ends[pairs.OVERFLOWS - 1]) & (place < ends[pairs.OVERFLOWS])
    is_affected = oracle.sums(joined.of, inside.astype(float))[joined.of] > 0
    r = np.where(is_affected, 0, joined.r)
    return oracle.nearest(joined.of, joined.g, r)


def _of_weights(rule: str) -> Iterator[Outcome]:
    """Checks a rule's weights on a grid of Gram matrices."""
    gram = oracle.grams(_NORMS, _COSINES)
    ours = jax.jit(getattr(rules, rule))(jnp.asarray(gram, jnp.float32))
    norms = np.sqrt(np.einsum("nii->ni", gram))
    exact = oracle.rules()[rule](gram)
    apart = np.abs(np.float64(ours) - exact) * norms
    worst = np.max(apart.sum(-1) / (np.abs(exact) * norms).sum(-1))
    detail = f"{len(gram)} Gram matrices, error {worst:.1e}"
    yield Outcome(f"{rule}, weights", bool(worst <= _RULES), detail)


def _of_rule(updates: Updates, count: int) -> Iterator[Outcome]:
    """Checks a rule's updates: both gradients times its weights, in each group."""
    subject = updates.subject
    many = pairs.ordinary(4, count, dtype_of(subject.dtype), subject.shapes)
    joined = _joined(subject, many, updates(many)[0])
    of, g, r, ours = joined
    products = [oracle.sums(of, x * y) for x, y in ((g, g), (g, r), (r, r))]
    gram = np.stack([products[i] for i in (0, 1, 1, 2)], -1).reshape(-1, 2, 2)
    weights = oracle.rules()[subject.rule](gram)
    norms = np.stack([joined.norms(g), joined.norms(r)], -1)
    # The update is `g` and a part: where a rule shrinks `g`, that costs digits.
    size = (np.abs(weights) * norms).sum(-1)
    rounding = _RULES + _ROUNDING[subject.dtype]
    exact = weights[of, 0] * g + weights[of, 1] * r
    error = joined.norms(ours - exact)
    worst = _largest(error, rounding * size + _SUMS * norms.sum(-1))
    detail = f"{count} pairs, at worst {worst:.2f} of the bound"
    yield Outcome(subject.title, worst <= 1, detail)
