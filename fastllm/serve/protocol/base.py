"""What all bodies have in common: how they are read, and what is wrong with them said."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from fastllm.serve.errors import HTTPError


class Body(BaseModel):
    """A request's body, or a part of one."""

    model_config = ConfigDict(extra="forbid", strict=True, ser_json_inf_nan="null")


class Harmless(Body):
    """Fields that are taken and change nothing."""

    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None


B = TypeVar("B", bound=Body)


def read(kind: type[B], raw: bytes) -> B:
    """A body, checked. A field that is not known and null is left out: many clients send those.

    Raises:
        HTTPError: 400, naming the field.
    """
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
    unknown = [item["loc"] for item in found if item["type"] == "extra_forbidden"]
    if len(unknown) == len(found) and all(len(loc) == 1 for loc in unknown):
        body = json.loads(raw)
        if all(body[loc[0]] is None for loc in unknown):
            known = {key: value for key, value in body.items() if (key,) not in unknown}
            return read(kind, json.dumps(known).encode())
    raise refusal(found[0])


def refusal(error: Any) -> HTTPError:
    """What pydantic found as an answer. The value is not repeated: it may be long, or a secret."""
    if error["type"] == "json_invalid":
        return HTTPError(400, f"the body is no JSON: {error['msg']}", code="invalid_json")
    place = _place(error["loc"])
    if error["type"] == "extra_forbidden":
        return HTTPError(400, f"{place}: not supported", param=place, code="unknown_parameter")
    message = error["msg"][:1].lower() + error["msg"][1:]
    code = "missing_required_parameter" if error["type"] == "missing" else "invalid_value"
    return HTTPError(400, f"{place}: {message}" if place else message, param=place or None, code=code)


def _place(loc: tuple[int | str, ...]) -> str:
    """A path such as messages[2].content. Of a union's branches pydantic names the one it tried."""
    text = ""
    for item in loc:
        if isinstance(item, int):
            text += f"[{item}]"
        elif item.isidentifier():
            text += f".{item}" if text else item
    return text[:256]
