"""The report of a data set as one HTML file with thumbnails, for people.

Pictures that were refused are named and not shown: among them may be what nobody should see.
"""

from __future__ import annotations

import base64
import io
import pathlib

import jinja2
from PIL import Image

from calotype.serving.training.dataset.preparation import PreparedSet

_TEMPLATE = pathlib.Path(__file__).with_name("page.html")
_LONGEST_SIDE = 256


def html_page(prepared: PreparedSet) -> str:
    """Raises DatasetRefused ``dataset_changed``: a picture is not what was checked."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    thumbnails = {
        sample.file: _thumbnail(Image.fromarray(sample.image.transpose(1, 2, 0)))
        for sample in prepared.samples("all")
    }
    return template.render(report=prepared.report, thumbnails=thumbnails)


def _thumbnail(image: Image.Image) -> str:
    image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
