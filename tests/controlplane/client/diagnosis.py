"""What the pods of a namespace say when something that they were waited for did not come."""

import httpx
from controlplane.client.objects import Object

LOG_LINES, EVENTS = 15, 20


def describe_pods(api: httpx.Client, namespace: str) -> str:
    """The state of each pod, the last lines of its containers, and the namespace's last events.

    Never raises for what the API server refuses: the caller reports another failure.
    """
    try:
        pods = _items(api, f"/api/v1/namespaces/{namespace}/pods")
        events = _items(api, f"/api/v1/namespaces/{namespace}/events")
        parts = [part for pod in pods for part in _describe(api, namespace, pod)]
    except httpx.HTTPError as error:
        return f"the pods of {namespace} cannot be read: {error}"
    events.sort(key=lambda event: event["metadata"]["creationTimestamp"])
    lines = [
        f"{event.get('type')} {event['involvedObject'].get('kind')}/"
        f"{event['involvedObject'].get('name')} {event.get('reason')}: {event.get('message')}"
        for event in events[-EVENTS:]
    ]
    return "\n".join([*parts, f"--- last events in {namespace}", *lines])


def _describe(api: httpx.Client, namespace: str, pod: Object) -> list[str]:
    name, status = pod["metadata"]["name"], pod.get("status", {})
    parts = [f"--- pod {namespace}/{name}: {status.get('phase')}"]
    for container in (
        *status.get("initContainerStatuses", []),
        *status.get("containerStatuses", []),
    ):
        restarts = container["restartCount"]
        parts.append(f"{container['name']}, {restarts} restarts: {container['state']}")
        for previous in ("true", "false") if restarts else ("false",):
            asked = {"container": container["name"], "tailLines": str(LOG_LINES)}
            path = f"/api/v1/namespaces/{namespace}/pods/{name}/log"
            answer = api.get(path, params={**asked, "previous": previous})
            if answer.is_success and answer.text:
                parts.append(answer.text.rstrip())
    return parts


def _items(api: httpx.Client, path: str) -> list[Object]:
    return list(api.get(path).raise_for_status().json()["items"])
