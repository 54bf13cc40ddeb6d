"""Figures: what is drawn is what was given, and colour is never all that tells."""

import io
import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from dtnh_jax import plots


def test_the_projection_ends_on_the_edge_of_the_half_plane(tmp_path):
    g, r = np.array([2.0, 0.6]), np.array([-1.6, 2.2])
    figure = plots.projection(g.tolist(), r.tolist())
    figure.savefig(tmp_path / "projection.png")
    assert (tmp_path / "projection.png").stat().st_size > 10_000
    (axes,) = figure.axes
    ends = {text.get_text(): np.array(text.xy) for text in axes.texts}
    np.testing.assert_allclose(ends["g + r"], g + r)
    np.testing.assert_allclose(g @ ends["DTNH"], g @ g, rtol=1e-6)


def test_a_zero_loss_gradient_is_no_half_plane():
    with pytest.raises(ValueError, match="`g` not zero"):
        plots.projection((0.0, 0.0), (1.0, 1.0))


def rendered(figure, path):
    figure.savefig(path)
    return path.stat().st_size


def ratio_row(name, ratio, target, **others):
    is_met = None if target is None else ratio <= target
    spread = {"ratio": ratio, "ratio_low": 0.9 * ratio, "ratio_high": 1.1 * ratio}
    row = {"group": "steps", "subject": "net", "name": name, "against": "plain"}
    return {**row, **spread, "target": target, "is_met": is_met, **others}


def test_the_title_of_benchmarks_says_what_was_found(tmp_path):
    rows = [
        ratio_row("near", 1.06, 1.05),
        ratio_row("far", 3.0, 1.05, group="peers"),
        ratio_row("good", 1.0, 1.05),
        ratio_row("free", 2.0, None),
        {**ratio_row("alone", 1.0, None), "ratio": None},
    ]
    figure = plots.benchmark_ratios(rows)
    assert rendered(figure, tmp_path / "speed.png") > 10_000
    title = figure.get_suptitle()
    assert title.startswith("1 of 3 targets met; furthest off: net, far,")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["steps", "peers"]
    steps, _ = figure.axes
    ends = [bar.get_x() + bar.get_width() for bar in steps.patches]
    np.testing.assert_allclose(ends, [1.06, 1.0, 2.0])
    assert len({bar.get_facecolor() for bar in steps.patches}) == 3
    assert len({bar.get_hatch() for bar in steps.patches}) == 3
    plain = plots.benchmark_ratios([ratio_row("free", 2.0, None)])
    assert plain.get_suptitle() == "Times without targets"


def test_a_map_of_conflict_has_a_colour_for_each_side(tmp_path):
    cosines = np.array([[0.2, 0.1, 0.0], [-0.4, np.nan, 0.4], [-0.1, -0.1, -0.1]])
    cosines = np.concatenate([cosines, np.full((1, 3), np.nan)])
    names = ["first", "second", "third", "unknown"]
    figure = plots.conflict_map(cosines, names)
    axes = figure.axes[0]
    (image,) = axes.images
    # Full colours at the largest cosine of either sign, and white between them.
    assert image.get_clim() == (-0.4, 0.4)
    red, _, blue, _ = image.cmap(image.norm(-0.4))
    assert red > blue
    red, _, blue, _ = image.cmap(image.norm(0.4))
    assert blue > red
    assert min(image.cmap(image.norm(0.0))) > 0.98
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    assert "at 50% of the steps on average, third at 100%" in axes.get_title()
    figure.savefig(tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 5000
    everything_unknown = np.full((1, 2), np.nan)
    assert plots.conflict_map(everything_unknown, ["a"]).axes[0].get_title() == ""


def lines(methods):
    return [
        {"method": name, "seed": 0, "step": step, "cosine": 0.1, "conflict": 0.25}
        for name in methods
        for step in (1, 2, 3)
    ]


MANY = [f"a_rule_of_many_{number}" for number in range(20)]
SWEEP = [(0.01, 0.02, None, None), (1.0, -0.3, -0.4, -0.2)]
FIGURES = {
    "accuracy_by_method": lambda: plots.accuracy_by_method(
        {"l2_sp": [0.5, 0.6], "l2_sp+dtnh": [0.7]}, {"l2_sp": (0.4, 0.7)}
    ),
    "benchmark_ratios": lambda: plots.benchmark_ratios(
        [ratio_row("a thing with quite a long name", ratio, 1.0) for ratio in (0.1, 9)]
    ),
    "benchmark_ratios, all near 1": lambda: plots.benchmark_ratios(
        [ratio_row("near", 1.01, 1.05)]
    ),
    "conflict_map": lambda: plots.conflict_map(
        np.array([[0.1, -0.2], [-0.3, np.nan]]), ["body", "head"]
    ),
    "conflict_over_steps": lambda: plots.conflict_over_steps(lines(MANY[:7])),
    "conflict_over_steps, many": lambda: plots.conflict_over_steps(lines(MANY)),
    "prediction_grid": lambda: plots.prediction_grid(
        np.zeros((7, 8, 8, 3), np.uint8),
        [0] * 7,
        {"batch_spectral_shrinkage+dtnh": [0] * 7, "l2": [1] * 7},
        ["cup", "mug"],
    ),
    "forgetting": lambda: plots.forgetting(
        {name: [(3.0, 2.5), (3.5, 2.2)] for name in MANY[:7]}, (4.0, 2.0)
    ),
    "forgetting, many": lambda: plots.forgetting(
        {name: [(3.0, 2.5)] for name in MANY}, (4.0, 2.0)
    ),
    "prediction_grid, of one": lambda: plots.prediction_grid(
        np.zeros((1, 8, 8, 3), np.uint8), [0], {"l2": [0], "l2+dtnh": [1]}, ["cup"]
    ),
    "projection": lambda: plots.projection([2.0, 0.6], [-1.6, 2.2]),
    "projection, hardly any r": lambda: plots.projection([1.0, 0.0], [-0.03, 0.05]),
    "projection, against g": lambda: plots.projection([1.0, 0.0], [-3.0, 0.1]),
    "projection, downwards": lambda: plots.projection([0.0, 1.0], [-0.9, -1.4]),
    "projection, along g": lambda: plots.projection([0.0, 1.0], [0.0, 0.5]),
    "strength_sweep": lambda: plots.strength_sweep(
        {f"panel {i}": dict.fromkeys(MANY[:8], SWEEP) for i in range(5)}
    ),
    "strength_sweep, many": lambda: plots.strength_sweep(
        {"panel": dict.fromkeys(MANY, SWEEP)}
    ),
}


def test_every_function_is_drawn_below_and_shows_an_example():
    functions = set(plots.__all__) - {"COLOURS"}
    assert {name.partition(",")[0] for name in FIGURES} == functions
    for name in functions:
        assert "Example:\n" in getattr(plots, name).__doc__


@pytest.mark.parametrize("name", FIGURES)
def test_a_title_says_what_was_found_and_nothing_covers_another(name):
    figure = FIGURES[name]()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    titles = [figure.get_suptitle(), *(axes.get_title() for axes in figure.axes)]
    assert any(any(character.isdigit() for character in x) for x in titles) or (
        "DTNH" in titles[0]
    )
    words = [figure._suptitle, *figure.legends]
    for axes in figure.axes:
        words += [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
    boxes = [
        (str(each), each.get_window_extent(canvas.get_renderer()))
        for each in words
        if each is not None and each not in empty(words)
    ]
    width, height = canvas.get_width_height()
    for label, box in boxes:
        assert -1 <= box.x0 < box.x1 <= width + 1, label
        assert -1 <= box.y0 < box.y1 <= height + 1, label
    for (one, box), (other, another) in itertools.combinations(boxes, 2):
        assert not box.overlaps(another), (one, other)


def empty(words):
    """Texts without letters; arrows are texts too."""
    return [each for each in words if hasattr(each, "get_text") and not each.get_text()]


def test_intervals_are_named_only_where_they_are_drawn():
    accuracies = {"l2_sp": [0.5, 0.6], "l2_sp+dtnh": [0.7, 0.7]}

    def said(*arguments):
        (axes,) = plots.accuracy_by_method(*arguments).axes
        return axes.get_xlabel()

    assert said(accuracies, {"l2_sp": (0.4, 0.7)}) == (
        "test accuracy (%): mean, 95% interval and every seed"
    )
    for nothing in (None, {}, {"another": (0.4, 0.7)}):
        assert said(accuracies, nothing) == "test accuracy (%): mean and every seed"
    assert said({"l2_sp": [0.5]}) == "test accuracy (%) of one seed"


def test_steps_without_a_finite_number_are_left_out():
    good = {"method": "m", "seed": 0, "step": 1, "cosine": -0.5, "conflict": 1.0}
    bad = {**good, "seed": 1, "cosine": None, "conflict": None}
    figure = plots.conflict_over_steps([good, bad, {**bad, "step": 2}])
    above, below = figure.axes
    np.testing.assert_array_equal(above.lines[0].get_ydata(), [-0.5, np.nan])
    np.testing.assert_array_equal(below.lines[0].get_ydata(), [100, np.nan])
    assert figure.get_suptitle() == "In conflict on average: 100% (m)"
    assert plots.conflict_over_steps([bad]).get_suptitle() == ""


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.conflict_map(np.zeros((2, 3)), ["a"]), "2, 3. and 1 names"),
        (lambda: plots.conflict_map(np.full((1, 1), -1.5), ["a"]), "1, got -1.5"),
        (lambda: plots.benchmark_ratios([]), "a row with a `ratio`, got none"),
    ],
)
def test_bars_name_what_is_wrong(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


# Names of users

NAME = "$5-$10 \\$x$ _{a}"


def texts(figure):
    figure.savefig(io.BytesIO())
    return [text for text in figure.findobj(Text) if text.get_text()]


def named(figure, name):
    """Whether a figure draws a name somewhere, and nowhere as mathematics."""
    ours = [text for text in texts(figure) if name in text.get_text()]
    ours = [text for text in ours if "mathdefault" not in text.get_text()]  # 10 ** n
    assert not any(text.get_parse_math() for text in ours)
    return len(ours)


@pytest.mark.parametrize("name", [NAME, "$0_to_$10", "$", "_hidden"])
def test_a_name_is_drawn_as_it_is(name):
    images = np.zeros((2, 4, 4, 3), np.uint8)
    found = {name: [0, 0], "other": [0, 1]}
    assert named(plots.prediction_grid(images, [0, 1], found, [name, "b"]), name) >= 3
    assert named(plots.accuracy_by_method({name: [0.5], "other": [0.4]}), name) >= 2
    line = {"method": name, "seed": 0, "step": 1, "cosine": 0.1, "conflict": 0.0}
    assert named(plots.conflict_over_steps([line]), name) >= 2
    assert named(plots.conflict_map(np.array([[0.1, -0.2]]), [name]), name) >= 2
    panels = {name: {name: [(1.0, 0.1, None, None)]}}
    assert named(plots.strength_sweep(panels), name) >= 3
    rows = [ratio_row(name, 3.0, 1.0, group=name)]
    assert named(plots.benchmark_ratios(rows), name) >= 3


def test_a_long_name_of_a_class_ends_where_the_next_begins():
    images = np.zeros((2, 4, 4, 3), np.uint8)
    figure = plots.prediction_grid(images, [0, 1], {}, ["a" * 99, "b"])
    shown, other = (axes.title.get_text() for axes in figure.axes)
    assert shown.startswith("aaaaaaaaaaaa")
    assert shown.endswith("a\u2026")
    assert other == "b"
    first, second = (axes.title.get_window_extent() for axes in figure.axes)
    assert first.x1 < second.x0


def test_what_is_learned_and_forgotten_at_most_is_in_the_title():
    curves = {"kl": [(3.5, 2.1), (3.2, 2.4)], "lora": [(3.0, 2.6)]}
    figure = plots.forgetting(curves, (4.0, 2.0))
    title = "Target loss from 4.00 to 3.00, forgotten up to +0.60 nats"
    assert figure.get_suptitle() == title
    first, second, base, _ = figure.axes[0].lines
    assert first.get_xydata().tolist() == [[3.2, 2.4], [3.5, 2.1]]
    assert second.get_marker() != first.get_marker()
    assert base.get_xydata().tolist() == [[4.0, 2.0]]
    with pytest.raises(ValueError, match="at least 1 method, got 0"):
        plots.forgetting({}, (4.0, 2.0))
    with pytest.raises(ValueError, match=r"`curves\['kl'\]` must hold a point"):
        plots.forgetting({"kl": []}, (4.0, 2.0))
