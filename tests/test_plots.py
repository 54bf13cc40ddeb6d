"""The figure of the two gradients is drawn from the rule itself."""

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
