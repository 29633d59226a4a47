"""Who the operator is for the API server: a ServiceAccount's token, or a kubeconfig file."""

from __future__ import annotations

import os

import kopf


def read_login() -> kopf.ConnectionInfo:
    """``$KUBECONFIG`` where it is set, else the pod's ServiceAccount, else ``~/.kube/config``.

    Read again at every call: the token of a ServiceAccount is replaced while the pod runs.

    Raises:
        kopf.LoginError: there is none of the three.
    """
    settings = kopf.OperatorSettings()
    ways = [kopf.login_with_service_account, kopf.login_with_kubeconfig]
    if os.environ.get("KUBECONFIG"):
        ways.reverse()
    for way in ways:
        found = way(settings=settings)
        if found is not None:
            return found
    raise kopf.LoginError(
        "no API server is known: run inside a pod with a ServiceAccount, or set KUBECONFIG to the "
        "path of a kubeconfig file"
    )
