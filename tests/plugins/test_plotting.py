"""The look of our plots."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from gplq.plugins.plotting import look, new_figure, save


def test_forty_lines_look_different() -> None:
    looks = [tuple(look(number).items()) for number in range(40)]
    assert len(set(looks)) == 40
    assert look(40) == look(0)


def test_a_figure_is_written_without_a_display_and_with_a_grid(tmp_path: Path) -> None:
    sizes = []
    for name, panels in (('one', 1), ('two', 2)):
        figure = new_figure(3.0, 2.0)
        for axes in figure.subplots(1, panels, squeeze=False)[0]:
            axes.plot([0, 1], [0, 1])
        save(figure, tmp_path / f'{name}.png')
        assert all(axes.get_xgridlines()[0].get_visible() for axes in figure.axes)
        sizes.append(Image.open(tmp_path / f'{name}.png').size)
    assert sizes == [(330, 220)] * 2
