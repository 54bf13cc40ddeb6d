"""Figures: what is drawn is what was given, and colour is never all that tells."""

import numpy as np
import pytest

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


def test_a_bar_of_harm_is_as_long_as_its_share(tmp_path):
    rates = {"sgd": {"sum": 0.5, "dtnh": 0.25}, "adam": {"dtnh": 0.0}}
    figure = plots.harm_rates(rates)
    assert rendered(figure, tmp_path / "harm.png") > 5000
    sgd, adam = figure.axes
    assert [bar.get_width() for bar in sgd.patches] == [50, 25]
    assert [label.get_text() for label in sgd.get_yticklabels()] == ["sum", "dtnh"]
    # A rule looks the same everywhere, and not only by its colour.
    (other,) = adam.patches
    assert other.get_facecolor() == sgd.patches[1].get_facecolor()
    assert sgd.patches[0].get_hatch() != sgd.patches[1].get_hatch()


def test_where_nothing_is_harmed_there_is_a_figure_too(tmp_path):
    figure = plots.harm_rates({"sgd": {"sum": 0.0}})
    assert rendered(figure, tmp_path / "harm.png") > 3000


def test_worst_cases_are_in_percentage_points(tmp_path):
    figure = plots.worst_cases({"sum": -0.566, "never-hurt": 0.01, "none": 0.0})
    assert rendered(figure, tmp_path / "worst.png") > 5000
    (axes,) = figure.axes
    np.testing.assert_allclose(
        [bar.get_width() for bar in axes.patches], [-56.6, 1.0, 0.0]
    )
    harm, gain, _ = axes.patches
    assert harm.get_facecolor() != gain.get_facecolor()
    assert harm.get_hatch() != gain.get_hatch()
    low, high = axes.get_xlim()
    assert low < -56.6
    assert high > 1


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


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.conflict_map(np.zeros((2, 3)), ["a"]), "2, 3. and 1 names"),
        (lambda: plots.conflict_map(np.full((1, 1), -1.5), ["a"]), "1, got -1.5"),
        (lambda: plots.harm_rates({}), "at least 1 optimizer, got 0"),
        (lambda: plots.harm_rates({"sgd": {}}), "'sgd'.* must hold a rule, got none"),
        (lambda: plots.harm_rates({"a": {"b": 1.5}}), "between 0 and 1, got 1.5"),
        (lambda: plots.worst_cases({}), "at least 1 rule, got 0"),
        (lambda: plots.worst_cases({"a": -56.6}), "between -1 and 1, got -56.6"),
        (lambda: plots.benchmark_ratios([]), "a row with a `ratio`, got none"),
    ],
)
def test_bars_name_what_is_wrong(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
