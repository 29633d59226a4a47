"""The application as an object, for ``serve build``, which takes no arguments.

    CALOTYPE_MANIFESTS=examples \\
        serve build calotype.serving.deployments.application:app -o serve.yaml

CALOTYPE_MANIFESTS and CALOTYPE_DATA_DIR stand for the arguments of ``serve run``. The built file
carries models, adapters and policy as ``user_config``: edit them there and deploy it again.
"""

from __future__ import annotations

import os

from calotype.serving.deployments.app import build_app

app = build_app(
    {
        "manifests": os.environ.get("CALOTYPE_MANIFESTS", ""),
        "data_dir": os.environ.get("CALOTYPE_DATA_DIR", "calotype-data"),
    }
)
