"""Whatever a client sends: the answer of api.md, and the next request works."""

from __future__ import annotations

import json
import socket
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

GENERATIONS = "/v1/images/generations"


def check(answer: httpx.Response, status: int, code: str, param: str | None) -> dict[str, Any]:
    """Asserts the one shape that every failure has."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert len(answer.headers.get_list("x-request-id")) == 1
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param), error
    assert error["message"].endswith((".", "?")), error["message"]
    return error


CASES: list[tuple[str, dict[str, Any], int, str, str | None, str]] = [
    ("empty prompt", {"prompt": ""}, 400, "invalid_value", "prompt", "must not be empty"),
    ("blank prompt", {"prompt": " \n\t"}, 400, "invalid_value", "prompt", "must not be empty"),
    ("long prompt", {"prompt": "x" * 40_000}, 400, "invalid_value", "prompt", "at most 32,000"),
    ("no prompt", {"prompt": None}, 400, "missing_required_parameter", "prompt", "Missing"),
    ("prompt is a list", {"prompt": ["a"]}, 400, "invalid_type", "prompt", "string"),
    ("n=0", {"n": 0}, 400, "invalid_value", "n", "greater than or equal to 1"),
    ("n=11", {"n": 11}, 400, "invalid_value", "n", "less than or equal to 10"),
    ("n is text", {"n": "2"}, 400, "invalid_type", "n", "integer"),
    ("n is a boolean", {"n": True}, 400, "invalid_type", "n", "integer"),
    ("n is a fraction", {"n": 1.5}, 400, "invalid_type", "n", "integer"),
    ("n is huge", {"n": 10**400}, 400, "invalid_value", "n", "less than or equal to 10"),
    ("size 99x99", {"size": "99x99"}, 400, "invalid_value", "size", "multiples of 16"),
    ("size 1x100000", {"size": "1x100000"}, 400, "invalid_value", "size", "too small"),
    ("size abc", {"size": "abc"}, 400, "invalid_value", "size", "WIDTHxHEIGHT"),
    ("size 16x16", {"size": "16x16"}, 400, "invalid_value", "size", "at least 64"),
    ("size too large", {"size": "4096x4096"}, 400, "resolution_too_large", "size", "at most"),
    ("size too long", {"size": "64x2048"}, 400, "invalid_value", "size", "16 times"),
    ("width alone", {"width": 128}, 400, "missing_required_parameter", "height", "together"),
    ("odd width", {"width": 130, "height": 128}, 400, "invalid_value", "width", "nearest"),
    ("unknown model", {"model": "dall-e-9"}, 404, "model_not_found", "model", "offers: shapes"),
    ("promt", {"promt": "x"}, 400, "unknown_parameter", "promt", "'prompt'"),
    ("misspelt and so missing", {"promt": "x", "prompt": None}, 400, "unknown_parameter",
     "promt", "'prompt'"),
    ("steps of diffusers", {"num_inference_steps": 4}, 400, "unknown_parameter",
     "num_inference_steps", "'steps'"),
    ("proportions", {"aspect_ratio": "16:9"}, 400, "unknown_parameter", "aspect_ratio", "'size'"),
    ("size of fal", {"image_size": "square"}, 400, "unknown_parameter", "image_size", "'size'"),
    ("count of fal", {"num_images": 2}, 400, "unknown_parameter", "num_images", "'n'"),
    ("a time limit", {"timeout": 9}, 400, "unknown_parameter", "timeout", "'deadline_seconds'"),
    ("jpg", {"output_format": "jpg"}, 400, "invalid_value", "output_format", "'jpeg'"),
    ("extra_body", {"extra_body": {"steps": 4}}, 400, "unknown_parameter", "extra_body", "beside"),
    ("close to what is refused", {"controlnet": []}, 400, "unknown_parameter", "controlnet",
     "Unknown parameter: 'controlnet'."),
    ("far from anything", {"zzzzzz": 1}, 400, "unknown_parameter", "zzzzzz", "Unknown"),
    ("unknown quality", {"quality": "best"}, 400, "invalid_value", "quality", "'high'"),
    ("negative seed", {"seed": -1}, 400, "invalid_value", "seed", "greater than or equal"),
    ("huge seed", {"seed": 2**63}, 400, "invalid_value", "seed", "less than or equal"),
    ("seed + n", {"seed": 2**63 - 1, "n": 2}, 400, "invalid_value", "seed", "seed + n"),
    ("steps 0", {"steps": 0}, 400, "invalid_value", "steps", "greater than or equal"),
    ("steps 51", {"steps": 51}, 400, "invalid_value", "steps", "at most 50"),
    ("sigmas that rise", {"sigmas": [0.5, 0.7]}, 400, "invalid_value", "sigmas", "must fall"),
    ("sigmas from above 1", {"sigmas": [1.5, 0.7]}, 400, "invalid_value", "sigmas", "must fall"),
    ("sigmas to 0", {"sigmas": [1.0, 0]}, 400, "invalid_value", "sigmas", "must fall"),
    ("fewer sigmas than steps", {"sigmas": [1.0, 0.5], "steps": 3}, 400, "invalid_value", "sigmas",
     "each of the 3 steps; got 2"),
    ("51 sigmas", {"sigmas": [1 - i / 99 for i in range(51)]}, 400, "invalid_value", "sigmas",
     "at most 50"),
    ("guidance", {"guidance_scale": 101}, 400, "invalid_value", "guidance_scale", "100"),
    ("two guidances", {"guidance_scale": 1, "guidance": 1}, 400, "invalid_value", "guidance",
     "the same"),
    ("gif", {"output_format": "gif"}, 400, "unsupported_value", "output_format", "png, jpeg"),
    ("bmp", {"output_format": "bmp"}, 400, "invalid_value", "output_format", "'png'"),
    ("compression", {"output_compression": 101}, 400, "invalid_value", "output_compression", "100"),
    ("transparent", {"background": "transparent"}, 400, "unsupported_value", "background",
     "opaque"),
    ("partial images", {"partial_images": 2}, 400, "invalid_value", "partial_images", "stream"),
    ("four partial images", {"stream": True, "partial_images": 4}, 400, "invalid_value",
     "partial_images", "less than or equal to 3"),
    ("stream is text", {"stream": "yes"}, 400, "invalid_type", "stream", "boolean"),
    ("control nets", {"controlnets": [{}]}, 400, "missing_required_parameter",
     "controlnets[0].id", "Missing"),
    ("a recipe that is none", {"prompt": None, "recipe": 1}, 400, "invalid_type", "recipe",
     "object"),
    ("a recipe of the future", {"prompt": None, "recipe": {"version": 99}}, 400, "invalid_value",
     "recipe.version", "must be 1"),
    ("sampler", {"scheduler": "ddim"}, 400, "invalid_value", "sampler", "flow-euler"),
    ("response format", {"response_format": "png"}, 400, "invalid_value", "response_format",
     "b64_json"),
    ("unknown adapter", {"loras": [{"id": "spots"}]}, 404, "not_found", "loras[0].id",
     "It may use: stripes"),
    ("scale out of range", {"loras": [{"id": "stripes", "scale": 9}]}, 400, "invalid_value",
     "loras[0].scale", "0 to 1.5"),
    ("adapter twice", {"loras": [{"id": "stripes"}] * 2}, 400, "invalid_value", "loras[1].id",
     "twice"),
    ("five adapters", {"loras": [{"id": str(i)} for i in range(5)]}, 400, "invalid_value",
     "loras", "at most 4"),
    ("adapter without id", {"loras": [{"scale": 1}]}, 400, "missing_required_parameter",
     "loras[0].id", "Missing"),
    ("adapter is text", {"loras": ["stripes"]}, 400, "invalid_type", "loras[0]", "LoRA"),
    ("loras is an object", {"loras": {"id": "x"}}, 400, "invalid_type", "loras", "list"),
    ("metadata of numbers", {"metadata": {"a": 1}}, 400, "invalid_type", "metadata.a", "string"),
    ("deadline", {"deadline_seconds": 0}, 400, "invalid_value", "deadline_seconds", "greater"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "status", "code", "param", "says"),
    [case[1:] for case in CASES],
    ids=[case[0] for case in CASES],
)
def test_a_bad_parameter_is_named(
    shared_service: Any, change: dict[str, Any], status: int, code: str, param: str, says: str
) -> None:
    body = json.dumps({"prompt": "a dog"} | change)
    client = shared_service.http()
    answer = client.post(GENERATIONS, content=body, headers={"content-type": "application/json"})
    error = check(answer, status, code, param)
    assert says in error["message"]
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 400, "a long input is not thrown back"


BODIES: list[tuple[str, bytes, int, str, str | None]] = [
    ("nothing", b"", 400, "invalid_json", None),
    ("half an object", b'{"prompt": "a', 400, "invalid_json", None),
    ("a list", b"[1, 2]", 400, "invalid_json", None),
    ("a number", b"1", 400, "invalid_json", None),
    ("NaN", b'{"prompt": "a", "guidance_scale": NaN}', 400, "invalid_json", None),
    ("-Infinity", b'{"prompt": "a", "seed": -Infinity}', 400, "invalid_json", None),
    ("a float that overflows", b'{"prompt": "a", "guidance_scale": 1e999}', 400, "invalid_value",
     "guidance_scale"),
    ("an int of 5,000 digits", b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400,
     "invalid_json", None),
    ("10,000 levels", b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", 400, "invalid_json",
     None),
    ("900 levels", b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}", 400, "invalid_json", None),
    ("100,000 open brackets", b"[" * 100_000, 400, "invalid_json", None),
    ("no UTF-8", b'{"prompt": "\xff\xfe"}', 400, "invalid_json", None),
    ("UTF-16", '{"prompt": "a"}'.encode("utf-16"), 400, "invalid_json", None),
    ("half a surrogate pair", b'{"prompt": "\\ud800"}', 400, "invalid_json", None),
    ("a NUL", b'{"prompt": "a\\u0000b"}', 400, "invalid_json", None),
    ("a key twice", b'{"prompt": "a", "prompt": "b"}', 400, "invalid_json", "prompt"),
    ("multipart", b"--x", 400, "invalid_json", None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [case[1:] for case in BODIES],
    ids=[case[0] for case in BODIES],
)
def test_a_body_that_is_no_good_json_is_a_400(
    shared_service: Any, body: bytes, status: int, code: str, param: str | None
) -> None:
    client = shared_service.http()
    for path in (GENERATIONS, "/v1/jobs", "/v1/moderations"):
        answer = client.post(path, content=body, headers={"content-type": "application/json"})
        if path == GENERATIONS:
            check(answer, status, code, param)
        assert answer.status_code == 400, (path, answer.text)


def test_text_that_only_looks_like_a_nul_is_accepted(shared_service: Any) -> None:
    assert shared_service.generate(prompt="a\\u0000b", n=1).status_code == 200


def test_other_content_types_and_two_of_them_are_refused(shared_service: Any) -> None:
    client = shared_service.http()
    form = client.post(GENERATIONS, data={"prompt": "a dog"})
    check(form, 415, "unsupported_content_type", None)
    twice = client.post(
        GENERATIONS,
        content=b'{"prompt": "a dog"}',
        headers=[("content-type", "application/json"), ("content-type", "text/plain")],
    )
    check(twice, 400, "invalid_value", None)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_a_413(shared_service: Any, chunked: bool) -> None:
    # What is over the limit is refused before all of it was read, so only some of it is sent.
    where = urlsplit(shared_service.url)
    length = "transfer-encoding: chunked" if chunked else f"content-length: {10**12}"
    head = (
        f"POST {GENERATIONS} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {shared_service.key}\r\n"
        f"content-type: application/json\r\n{length}\r\n\r\n"
    )
    with socket.create_connection((where.hostname or "", where.port or 0), timeout=600) as raw:
        raw.sendall(head.encode())
        if chunked:
            chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
            for _ in range(33):
                raw.sendall(chunk)
        answer = b""
        while b"body_too_large" not in answer and (part := raw.recv(65536)):
            answer += part
    assert b" 413 " in answer.split(b"\r\n")[0]
    assert b"body_too_large" in answer


@pytest.mark.parametrize("key", ["wrong", "ct_live_" + "A" * 43, "x" * 9000])
def test_a_wrong_key_is_a_401(shared_service: Any, key: str) -> None:
    answer = shared_service.http(key).post(GENERATIONS, json={"prompt": "a dog"})
    check(answer, 401, "invalid_api_key", None)
    assert key not in answer.text


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer"},
        {"authorization": "Basic YTpi"},
        [("authorization", "Bearer a"), ("authorization", "Bearer b")],
    ],
)
def test_no_key_is_a_401_everywhere(shared_service: Any, headers: Any) -> None:
    with httpx.Client(base_url=shared_service.url, verify=False, timeout=600) as client:
        for method, path in [
            ("POST", GENERATIONS),
            ("POST", "/v1/moderations"),
            ("POST", "/v1/jobs"),
            ("GET", "/v1/jobs"),
            ("GET", "/v1/jobs/job_x"),
            ("POST", "/v1/jobs/job_x/cancel"),
            ("GET", "/v1/models"),
            ("GET", "/v1/models/shapes"),
            ("GET", "/v1/assets/asset_x"),
            ("GET", "/v1/assets/asset_x/content"),
        ]:
            check(client.request(method, path, headers=headers), 401, "invalid_api_key", None)


def test_the_sdk_raises_its_own_classes(shared_service: Any) -> None:
    with pytest.raises(openai.AuthenticationError):
        shared_service.sdk("wrong").images.generate(prompt="a dog")
    with pytest.raises(openai.NotFoundError) as missing:
        shared_service.sdk().images.generate(prompt="a dog", model="dall-e-9")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        shared_service.sdk().images.generate(prompt="a dog", n=11)
    assert bad.value.param == "n"
    assert bad.value.request_id


def test_unknown_paths_and_methods_have_the_same_shape(shared_service: Any) -> None:
    client = shared_service.http()
    check(client.get("/v1/nothing"), 404, "unknown_url", None)
    check(client.get("/nothing\u2028"), 404, "unknown_url", None)
    answer = client.get(GENERATIONS)
    check(answer, 405, "method_not_allowed", None)
    assert "POST" in answer.headers["allow"]


def test_a_request_id_is_kept_when_it_is_harmless(shared_service: Any) -> None:
    client = shared_service.http()
    assert client.get("/healthz", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == (
        "abc-1"
    )
    for bad in ("a b", "x" * 200, "ü".encode()):
        given = client.get("/healthz", headers={"x-request-id": bad}).headers["x-request-id"]
        assert given.startswith("req_")


def test_after_all_of_this_the_next_request_works_and_no_job_is_open(shared_service: Any) -> None:
    assert shared_service.generate(prompt="a dog").status_code == 200
    assert {job.status for job in shared_service.jobs()} <= {"succeeded", "failed", "canceled"}
