"""What has gone wrong in servers of this kind, by its number in public lists, and which test keeps it away.

The tests stand where their subject is; this file names them, fails where one is gone, and has those that have
no other place.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import tiny
from serving import Running

ROOT = Path(__file__).parents[1]
HERE = "test_known_attacks"
GGUF = "test_gguf_bad_files"
BAD_TENSOR = f"{GGUF}::test_bad_tensor"
ATTACKS: dict[str, tuple[str, ...]] = {
    "CVE-2026-33298: sizes that wrap": (BAD_TENSOR, f"{GGUF}::test_every_number_replaced_in_turn"),
    "CVE-2026-7482: offsets beyond the file": (BAD_TENSOR, f"{GGUF}::test_every_truncation_is_refused"),
    "zero dimensions, wrong alignment": (BAD_TENSOR, f"{GGUF}::test_bad_metadata"),
    "empty keys, huge strings and arrays": (
        f"{GGUF}::test_bad_metadata",
        f"{GGUF}::test_numbers_beyond_the_limits_are_refused",
    ),
    "hyperparameters out of range": (
        "test_decoder::test_damaged_file",
        f"{GGUF}::test_a_mutated_file_opens_or_is_refused",
    ),
    "number of dimensions unbounded": (BAD_TENSOR,),
    "CVE-2024-34359, CVE-2026-5760, CVE-2024-56326: code in templates": (
        "test_chat_template::test_hostile_templates",
        "test_chat_template::test_the_clock_stops_a_rendering",
        f"{HERE}::test_no_request_brings_a_template",
    ),
    "CVE-2025-62426: template arguments that block the event loop": (
        "test_serve_protocol::test_a_field_that_is_wrong_is_named",
        f"{HERE}::test_a_slow_rendering_holds_nobody_up",
    ),
    "CVE-2026-34756: a million answers": ("test_serve_protocol::test_a_field_that_is_wrong_is_named",),
    "CVE-2025-48944: expressions and schemas that kill the server": (
        "test_structured::test_a_hostile_form_is_refused_and_the_engine_goes_on",
        "test_structured::test_a_panic_or_a_crash_of_the_trial_is_a_refusal",
        f"{HERE}::test_hostile_forms_over_http",
    ),
    "deep nesting, grammars that fail open": (
        "test_structured::test_a_form_beyond_its_limits_is_refused_before_anything_is_compiled",
        "test_structured::test_what_its_constraints_leave_nothing_for_ends_in_error_alone",
        "test_serve_protocol::test_what_is_no_body",
    ),
    "CVE-2025-59425: keys told by the time of the answer": (
        "test_serve_guard::test_keys_are_compared_whole",
    ),
    "routes without a key": (
        "test_serve_guard::test_every_route_but_the_open_ones_needs_a_key",
        "test_serve_guard::test_an_open_address_needs_keys",
    ),
    "CVE-2025-46570: prompts told by the time of the answer": (
        "test_serve_guard::test_keys_do_not_share_the_prefix_cache",
    ),
    "CVE-2025-25183: collisions of prefix hashes": (f"{HERE}::test_blocks_are_known_by_256_bits",),
    "pickle between processes": (f"{HERE}::test_nothing_is_unpickled",),
    "CVE-2025-62164: tensors in requests": (
        f"{HERE}::test_nothing_is_unpickled",
        f"{HERE}::test_no_request_brings_tensors",
        "test_safetensors_reader::test_pickled_weights_are_refused",
    ),
    "CVE-2026-22807: code of a model's directory": (f"{HERE}::test_no_code_of_a_model_is_run",),
    "CVE-2025-48956: endless headers and bodies": (
        "test_serve_guard::test_large_headers",
        "test_serve_guard::test_large_bodies",
        "test_serve_guard::test_prompt_tokens",
    ),
    "CVE-2026-21869: numbers that are not looked at": (
        "test_decoder::test_indices_out_of_range",
        "test_serve_protocol::test_a_prompt_that_is_wrong_is_named",
    ),
}


def names_of(module: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / f"{module}.py").read_text())
    return {item.name for item in ast.walk(tree) if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef))}


@pytest.mark.parametrize("attack", ATTACKS)
def test_its_tests_are_there(attack: str) -> None:
    for place in ATTACKS[attack]:
        module, _, name = place.partition("::")
        assert name in names_of(module), place


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    model = tiny.save_hf(tiny.make_model("llama"), tmp_path_factory.mktemp("serve") / "model")
    with Running(model) as running, running.client() as found:
        yield found


def sources() -> Iterator[tuple[Path, ast.AST]]:
    for folder in ("fastllm", "kernels"):
        for path in (ROOT / folder).rglob("*.py*"):
            if path.suffix in (".py", ".pyi"):
                yield path, ast.parse(path.read_text())


def test_nothing_is_unpickled() -> None:
    """No import of what runs code while it reads data, and no torch.load."""
    forbidden = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
    for path, tree in sources():
        for item in ast.walk(tree):
            if isinstance(item, ast.Import):
                assert not {name.name.split(".")[0] for name in item.names} & forbidden, path
            elif isinstance(item, ast.ImportFrom):
                assert (item.module or "").split(".")[0] not in forbidden, path
            elif isinstance(item, ast.Attribute) and item.attr == "load" and isinstance(item.value, ast.Name):
                assert item.value.id not in ("torch", "np", "numpy"), path


def test_blocks_are_known_by_256_bits() -> None:
    from fastllm.engine.sequence import prefix_root

    assert len(prefix_root("model", 16)) == 32


def test_no_code_of_a_model_is_run(tmp_path: Path) -> None:
    from fastllm import LLM, SamplingParams, UnsupportedModelError

    path = tiny.save_hf(tiny.make_model("llama"), tmp_path / "model")
    witness = tmp_path / "witness"
    (path / "modeling_evil.py").write_text(f"open({str(witness)!r}, 'w')\nclass Evil: pass\n")
    (path / "__init__.py").write_text(f"open({str(witness)!r}, 'w')\n")
    with LLM(path, threads=1, kv_cache_tokens=256) as llm:
        llm.generate("a", SamplingParams(max_tokens=1))
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="auto_map"):
        LLM(path, threads=1, kv_cache_tokens=256)
    assert not witness.exists()


def test_no_request_brings_a_template(client: httpx.Client) -> None:
    message = [{"role": "user", "content": "a"}]
    for field in ("chat_template", "template"):
        response = client.post("/v1/chat/completions", json={"messages": message, field: "{{ 1 }}"})
        assert response.json()["error"]["param"] == field
    for name in ("messages", "tools", "chat_template", "bos_token"):
        kwargs = {"messages": message, "chat_template_kwargs": {name: "{{ 1 }}"}}
        assert client.post("/v1/chat/completions", json=kwargs).status_code == 400


def test_no_request_brings_tensors(client: httpx.Client) -> None:
    for field in ("prompt_embeds", "multi_modal_data", "mm_processor_kwargs"):
        response = client.post("/v1/completions", json={"prompt": "a", field: "AAAA"})
        assert response.json()["error"]["code"] == "unknown_parameter"


def test_hostile_forms_over_http(client: httpx.Client) -> None:
    nested: dict[str, object] = {}
    for _ in range(200):
        nested = {"type": "object", "properties": {"a": nested}}
    for form in (
        {"guided_regex": "("},
        {"guided_regex": "(a{1000}){1000}" * 10},
        {"guided_grammar": "start: start"},
        {"guided_json": nested},
        {"guided_json": {"$ref": "#/nowhere"}},
        {"guided_choice": [""]},
    ):
        response = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 4, **form})
        assert response.status_code == 400, (form, response.text)
        assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200


def test_a_slow_rendering_holds_nobody_up(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading
    import time

    from fastllm.serve import conversation

    original = conversation.normalize_messages

    def slow(messages: object, template: str) -> list[dict[str, object]]:
        time.sleep(1.0)
        return original(messages, template)

    monkeypatch.setattr(conversation, "normalize_messages", slow)
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    thread = threading.Thread(target=client.post, args=("/v1/chat/completions",), kwargs={"json": body})
    thread.start()
    time.sleep(0.2)
    begin = time.monotonic()
    assert client.get("/health").status_code == 200
    assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200
    assert time.monotonic() - begin < 0.7
    thread.join()
