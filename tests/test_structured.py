"""Constrained answers: JSON schemas, regular expressions, grammars, choices."""

import asyncio
import json
import pickle
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Literal

import hypothesis
import jsonschema
import pydantic
import pytest
from hypothesis import strategies as st

import candle_llama
import tiny as checkpoints
from candle_llama import SamplingParams

SAMPLED = {"temperature": 1.0, "max_new_tokens": 400}

SHORT = {"type": "string", "maxLength": 6}
SCHEMAS = [
    {"type": "object"},
    {"type": "string", "maxLength": 3},
    {"type": "string", "minLength": 2, "maxLength": 4},
    {"type": "string", "pattern": "^[a-c]{2}x?$"},
    {"type": "integer", "minimum": -3, "maximum": 12},
    {"type": "number", "exclusiveMinimum": 0, "maximum": 2.5},
    {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100},
    {"type": "boolean"},
    {"type": "null"},
    {"type": ["integer", "null"], "maximum": 9, "minimum": 0},
    {"const": {"a": [1, None, "x"]}},
    {"enum": ["red", 3, None, {"k": True}]},
    {"enum": ["a", "ab", "abc"]},
    {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 2},
    {"type": "array", "prefixItems": [{"const": 1}, {"type": "null"}], "items": False},
    {"type": "object", "properties": {"b": SHORT, "a": {"type": "boolean"}}, "required": ["b", "a"]},
    {"type": "object", "properties": {"a": SHORT}, "additionalProperties": False},
    {"type": "object", "properties": {'é"\\': {"type": "null"}}, "required": ['é"\\']},
    {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
    {"oneOf": [{"type": "integer", "minimum": 0, "maximum": 9}, {"type": "null"}]},
    {"oneOf": [{"type": "null"}, {"$ref": "#/$defs/leaf"}], "$defs": {"leaf": {"type": "boolean"}}},
    {"oneOf": [{"const": 1, "title": "One"}, {"const": 2}, {"enum": ["a", True]}]},
    {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
    {"type": "integer", "minimum": 2**53 + 1, "maximum": 2**53 + 7},
    {"type": "string", "format": "password", "maxLength": 3},
    {"type": "object", "minProperties": 1, "maxProperties": 1},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]},
    {"$ref": "#/$defs/leaf", "$defs": {"leaf": {"type": "boolean"}}},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    {"title": "Anything", "type": "object", "description": "with \u00e9", "additionalProperties": SHORT},
    {
        "type": "object",
        "properties": {"tree": {"$ref": "#/$defs/tree"}},
        "required": ["tree"],
        "additionalProperties": False,
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {
                    "v": {"type": "boolean"},
                    "next": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]},
                },
                "required": ["v", "next"],
                "additionalProperties": False,
            }
        },
    },
]


class Cat(pydantic.BaseModel):
    kind: Literal["cat"] = "cat"
    lives: Annotated[int, pydantic.Field(ge=1, le=9)]


class Dog(pydantic.BaseModel):
    kind: Literal["dog"]
    tricks: Annotated[list[Literal["sit", "roll"]], pydantic.Field(max_length=3)]


class Owner(pydantic.BaseModel):
    name: Annotated[str, pydantic.Field(max_length=8)]
    pet: Annotated[Cat | Dog, pydantic.Field(discriminator="kind")]
    age: Annotated[int, pydantic.Field(ge=0, le=120)] | None = None


class Version1(pydantic.BaseModel):
    version: Literal[1]


class Version2(pydantic.BaseModel):
    version: Literal[2]


class Versioned(pydantic.BaseModel):
    value: Annotated[Version1 | Version2, pydantic.Field(discriminator="version")]


class WithKeys(pydantic.BaseModel):
    by_name: dict[Annotated[str, pydantic.StringConstraints(pattern="^a.{0,3}$")], bool]


class Even(pydantic.BaseModel):
    number: Annotated[int, pydantic.Field(ge=0, le=9)]

    @pydantic.field_validator("number")
    @classmethod
    def must_be_even(cls, number: int) -> int:
        if number % 2:
            raise ValueError("odd")
        return number


def check(out, schema):
    """A complete answer is valid JSON of the schema; returns whether it is complete."""
    if out.finish_reason == "length":
        assert out.parsed is None
        return False
    assert out.finish_reason == "stop"
    assert out.parsed == json.loads(out.text)
    jsonschema.Draft202012Validator(schema).validate(out.parsed)
    return True


def test_every_complete_answer_is_valid(llm):
    complete = Counter()
    for index, schema in enumerate(SCHEMAS):
        params = [SamplingParams(json_schema=schema, seed=seed, **SAMPLED) for seed in range(8)]
        complete[index] = sum(check(out, schema) for out in llm.generate(["the"] * 8, params))
    # Whatever is bounded is complete. The tiny model's other answers may be long.
    assert sum(count == 8 for count in complete.values()) >= 22, complete


@pytest.mark.parametrize(
    "changes",
    [
        {"min_new_tokens": 30},
        {"ignore_eos": True},
        {"stop": ["a", "e", '"', "}"]},
        {"stop_token_ids": [checkpoints.TOKEN_IDS["}"], checkpoints.TOKEN_IDS["1"]]},
        {"logit_bias": {checkpoints.TOKEN_IDS["x"]: 100.0, checkpoints.EOS: 100.0}},
        {"repetition_penalty": 1.5, "presence_penalty": 2.0, "frequency_penalty": 2.0},
        {"temperature": 0},
        {"temperature": 5.0, "top_k": 5},
        {"top_p": 0.1, "min_p": 0.5},
        {"skip_special_tokens": False},
        {"logits_processors": [lambda ids, logits: -logits]},
    ],
    ids=str,
)
def test_other_parameters_do_not_break_the_answer(llm, changes):
    for schema in (SCHEMAS[9], SCHEMAS[16], SCHEMAS[13]):
        params = [
            SamplingParams(json_schema=schema, seed=seed, **{**SAMPLED, **changes}) for seed in range(4)
        ]
        outs = llm.generate(["the"] * 4, params, return_exceptions=True)
        for out in outs:
            if isinstance(out, candle_llama.GenerationError):
                # Only where a stop token is all that the schema allows.
                assert "stop_token_ids" in changes
                assert "no token is left to draw" in str(out)
            else:
                check(out, schema)


SCALARS = st.one_of(
    st.sampled_from(
        [{"type": "boolean"}, {"type": "null"}, {"type": "integer", "minimum": -9, "maximum": 99}]
    ),
    st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 5)),
    st.builds(
        lambda values: {"enum": values},
        st.lists(st.one_of(st.text(max_size=4), st.integers(-5, 5), st.none()), min_size=1, max_size=4),
    ),
)


def objects(children):
    return st.builds(
        lambda properties, optional: {
            "type": "object",
            "properties": properties,
            "required": [name for name in properties if name not in optional],
            "additionalProperties": False,
        },
        st.dictionaries(st.text(min_size=1, max_size=4), children, max_size=3),
        st.sets(st.text(max_size=1)),
    )


def arrays(children):
    return st.builds(
        lambda items, most: {"type": "array", "items": items, "maxItems": most}, children, st.integers(0, 3)
    )


TREES = st.recursive(
    SCALARS,
    lambda children: st.one_of(
        objects(children), arrays(children), st.builds(lambda a, b: {"anyOf": [a, b]}, children, children)
    ),
    max_leaves=5,
)


@hypothesis.given(schema=TREES, seed=st.integers(0, 2**32))
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_random_schemas_are_followed(llm, schema, seed):
    out = llm.generate(["the"], json_schema=schema, seed=seed, return_exceptions=True, **SAMPLED)[0]
    if isinstance(out, ValueError):
        assert "json_schema" in str(out)
    else:
        check(out, schema)


def test_the_demo_answers_in_json(demo_llm):
    messages = [{"role": "user", "content": "Invent a pet owner. Answer in JSON."}]
    for seed in range(3):
        out = demo_llm.chat(messages, json_schema=Owner, seed=seed, temperature=1.0)
        assert out.finish_reason == "stop"
        assert isinstance(out.parsed, Owner)
    spaces = re.compile(r"[ \t\n]{18,}")
    assert not spaces.search(out.text)


def test_pydantic_models_and_unions_with_a_discriminator(llm):
    seen = set()
    for seed in range(12):
        out = llm.generate("the", json_schema=Owner, seed=seed, **{**SAMPLED, "temperature": 4.0})
        if out.finish_reason == "stop":
            assert isinstance(out.parsed, Owner)
            seen.add(type(out.parsed.pet))
    assert seen == {Cat, Dog}


@pytest.mark.parametrize("model", [Versioned, WithKeys])
def test_pydantic_models_accept_what_was_written(llm, model):
    given = [SamplingParams(json_schema=model, seed=seed, **SAMPLED) for seed in range(16)]
    outs = llm.generate(["the"] * 16, given)
    assert any(out.finish_reason == "stop" for out in outs)
    assert all(isinstance(out.parsed, model) for out in outs if out.finish_reason == "stop")


@pytest.fixture(scope="module")
def long_llm(tmp_path_factory):
    """A model with room for long answers."""
    config = checkpoints.tiny_config(max_position_embeddings=16000)
    folder = checkpoints.write_checkpoint(tmp_path_factory.mktemp("long") / "model", config)
    with candle_llama.load(folder) as llm:
        yield llm


def test_long_answers_are_followed_to_their_end_beside_each_other(long_llm):
    long = {"json_schema": {"type": "string", "minLength": 4000, "maxLength": 5000}}
    given = [SamplingParams(**long, seed=seed, temperature=1.0, max_new_tokens=8000) for seed in range(4)]
    outs = long_llm.generate(["the"] * 4, given)
    assert [out.finish_reason for out in outs] == ["stop"] * 4
    assert all(4000 <= len(out.parsed) <= 5000 for out in outs)
    # The state that they share is full by now, so this one has its own.
    assert long_llm.generate("the", given[1]).text == outs[1].text


def test_an_answer_that_python_cannot_read_is_an_error_with_the_answer(long_llm):
    one, end = checkpoints.TOKEN_IDS["1"], checkpoints.EOS

    def write_ones(token_ids, logits):
        logits[one if len(token_ids) < 4400 else end] = 1e9

    with pytest.raises(candle_llama.GenerationError, match=r"cannot read the answer as JSON: .* is 1111"):
        long_llm.generate(
            "the", json_schema={"type": "integer"}, max_new_tokens=5000, logits_processors=[write_ones]
        )


def test_a_grammar_may_hold_a_schema(llm):
    schema = json.dumps(Owner.model_json_schema())
    for seed in range(3):
        out = llm.generate("the", grammar=f'start: "<call>" %json {schema} "</call>"', seed=seed, **SAMPLED)
        assert out.text.startswith("<call>{")
        if out.finish_reason == "stop":
            Owner.model_validate_json(out.text.removeprefix("<call>").removesuffix("</call>"))
    with pytest.raises(ValueError, match="grammar: x-guidance is not supported"):
        llm.generate("the", grammar='start: %json {"x-guidance": {"lenient": true}}')


def test_the_order_of_properties_is_the_schemas(llm):
    schema = {
        "type": "object",
        "properties": {n: {"type": "null"} for n in "zay"},
        "required": ["a", "y", "z"],
    }
    out = llm.generate("the", json_schema={**schema, "additionalProperties": False}, **SAMPLED)
    assert list(out.parsed) == ["z", "a", "y"]


def test_an_answer_that_the_models_own_check_refuses_is_its_error(llm):
    params = [SamplingParams(json_schema=Even, seed=seed, **SAMPLED) for seed in range(16)]
    outs = llm.generate(["the"] * 16, params, return_exceptions=True)
    assert {type(out).__name__ for out in outs} == {"Completion", "ValidationError"}
    with pytest.raises(pydantic.ValidationError, match="odd"):
        llm.generate(["the"] * 16, params)
    loop_outs = asyncio.run(llm.agenerate(["the"] * 16, params, return_exceptions=True))
    assert [type(out) for out in loop_outs] == [type(out) for out in outs]


def test_regex_grammar_and_choice(llm):
    for seed in range(6):
        out = llm.generate("the", regex=r"[a-f]{2,5}(-\d){1,2}", seed=seed, **SAMPLED)
        assert re.fullmatch(r"[a-f]{2,5}(-\d){1,2}", out.text)
        assert (out.finish_reason, out.parsed) == ("stop", None)
        out = llm.generate(
            "the",
            grammar='start: NAME "=" sum\nsum: N | sum "+" N\nNAME: /[a-c]+/\nN: /[0-9]/',
            seed=seed,
            **SAMPLED,
        )
        assert out.finish_reason == "length" or re.fullmatch(r"[a-c]+=\d(\+\d)*", out.text)
        out = llm.generate("the", choice=["yes", 'yes, "sir"\n', "né"], seed=seed, **SAMPLED)
        assert out.text in ("yes", 'yes, "sir"\n', "né")
        assert out.parsed == out.text


def test_a_choice_may_hold_any_character(llm):
    assert llm.generate("the", choice=["a\x7fb\u2028\x01"]).text == "a\x7fb\u2028\x01"


def test_the_whole_of_a_choice_is_one_token_per_pass(llm):
    out = llm.generate("the", choice=["world"])
    assert out.token_ids[-1] != checkpoints.EOS, "no pass is spent on the end of a complete text"


def test_a_constrained_answer_is_the_same_alone_in_a_batch_streamed_and_preempted(tiny):
    params = [
        SamplingParams(
            json_schema=SCHEMAS[index % len(SCHEMAS)], seed=index, **{**SAMPLED, "max_new_tokens": 80}
        )
        for index in range(40)
    ]
    with candle_llama.load(tiny, max_num_seqs=1) as alone:
        expected = [alone.generate("the", one).token_ids for one in params]
    with candle_llama.load(tiny, context_length=128, kv_cache_bytes=10 * 2 * 2 * 20 * 64 * 2 * 2) as llm:
        assert [out.token_ids for out in llm.generate(["the"] * 40, params)] == expected
    with candle_llama.load(tiny) as llm:
        for one, ids in list(zip(params, expected, strict=True))[:6]:
            chunks = list(llm.stream("the", one))
            assert [i for chunk in chunks for i in chunk.token_ids] == ids

        async def read(one):
            return [i async for chunk in llm.astream("the", one) for i in chunk.token_ids]

        assert asyncio.run(read(params[3])) == expected[3]
        with ThreadPoolExecutor(8) as pool:
            outs = pool.map(lambda one: llm.generate("the", one).token_ids, params)
            assert list(outs) == expected


def test_parsed_needs_a_complete_answer(llm):
    out = llm.generate("the", json_schema={"type": "string", "minLength": 50}, max_new_tokens=3)
    assert (out.finish_reason, out.parsed) == ("length", None)
    assert llm.generate("the", max_new_tokens=2).parsed is None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"json_schema": {}, "regex": "a"}, TypeError, "give only one of json_schema, regex"),
        ({"json_schema": True}, TypeError, "json_schema must be a dict, JSON, or a pydantic model class"),
        ({"json_schema": Owner(name="x", pet=Dog(kind="dog", tricks=[]))}, TypeError, "pydantic model class"),
        ({"json_schema": {"not": {"type": "null"}}}, ValueError, '"not"'),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, ValueError, '"uniqueItems"'),
        ({"json_schema": {"type": "string", "format": "no-such"}}, ValueError, "no-such"),
        ({"json_schema": {"type": "strang"}}, ValueError, "strang"),
        ({"json_schema": {"oneOf": [{"minimum": 1}, {"maximum": 3}]}}, ValueError, "oneOf"),
        ({"json_schema": {"enum": [1, 2**53 + 1]}}, ValueError, "9007199254740993 is a number beyond 2^53"),
        ({"json_schema": {"const": 10**30}}, ValueError, "is a number beyond 2^53"),
        ({"json_schema": {"minProperties": 2}}, ValueError, "minProperties 2 is not supported"),
        ({"json_schema": {"x-guidance": {"lenient": True}}}, ValueError, "x-guidance is not supported"),
        ({"json_schema": {"$ref": "#/$defs/none"}}, ValueError, "none"),
        ({"json_schema": {"enum": []}}, ValueError, "json_schema: "),
        ({"json_schema": "{"}, ValueError, "json_schema: is not JSON"),
        ({"json_schema": "[]"}, ValueError, "json_schema: is not a JSON object"),
        ({"json_schema": {"default": float("nan")}}, ValueError, "JSON compliant"),
        ({"json_schema": {"title": "\ud800"}}, ValueError, "json_schema: is not JSON"),
        ({"json_schema": {"a": {1, 2}}}, TypeError, "not JSON serializable"),
        ({"regex": "("}, ValueError, "regex: "),
        ({"regex": ""}, ValueError, "regex: allows no text"),
        ({"regex": "a", "choice": ["a"]}, TypeError, "give only one of regex, choice"),
        ({"regex": "a" * (1 << 21)}, ValueError, "regex: got 2097152 bytes, expected at most 1048576"),
        ({"regex": 3}, TypeError, "regex must be a str"),
        ({"grammar": "start: nothing"}, ValueError, "grammar: "),
        ({"choice": []}, ValueError, "choice: needs at least one text"),
        ({"choice": ["a", ""]}, ValueError, "none may be empty"),
        ({"choice": "yes"}, TypeError, "choice must be a list of str"),
        ({"choice": {"yes"}}, TypeError, "choice must be a list of str"),
        ({"grammar": 'start: "x" <|end|>'}, ValueError, "special tokens are not supported in grammars"),
        ({"guided_json": {}}, TypeError, "it is json_schema here"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_refused(llm, options, error, message):
    for call in (llm.generate, lambda *args, **given: next(llm.stream(*args, **given))):
        with pytest.raises(error, match=re.escape(message)):
            call("the", **options)
    assert llm.generate("the", json_schema={"type": "null"}).text == "null"


def deep(depth):
    schema = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def chain(length, name="d"):
    """Definitions that refer to each other."""
    definitions = {f"{name}{i}": {"allOf": [{"$ref": f"#/$defs/{name}{i + 1}"}]} for i in range(length)}
    definitions[f"{name}{length}"] = {"type": "null"}
    return {"$defs": definitions, "$ref": f"#/$defs/{name}0"}


HOSTILE = [
    {"json_schema": {"enum": [f"{'word' * 10}{i}" for i in range(5000)]}},
    {"json_schema": {"type": "string", "pattern": "[^a]*" * 5000}},
    {"json_schema": chain(200)},
    {"json_schema": chain(1900)},
    {"json_schema": chain(7000)},
    {"json_schema": chain(7000, "d~1")},
    {"grammar": f"start: %json {json.dumps(chain(7000))}"},
    {"grammar": f'start: "%json {{" %json {json.dumps(chain(7000))}'},
    {"grammar": "start: a0\n" + "\n".join(f'a{i}: a{i + 1} "x"' for i in range(3000)) + '\na3000: "y"'},
    {"grammar": "start: A0\n" + "\n".join(f'A{i}: A{i + 1} "x"' for i in range(3000)) + '\nA3000: "y"'},
    {"regex": "(?:" * 240 + "a" + ")*" * 240},
    {"json_schema": deep(120)},
    {"json_schema": deep(5000)},
    {"json_schema": json.dumps(deep(300))},
    {"json_schema": {"$ref": "#"}},
    {"json_schema": {"allOf": [{"$ref": "#"}]}},
    {"json_schema": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}},
    {"json_schema": {"oneOf": [{"$ref": "#/oneOf/0"}, {"$ref": "#/oneOf/1"}]}},
    {
        "json_schema": {
            "$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(5000)},
            "$ref": "#/$defs/d0",
        }
    },
    {
        "json_schema": {
            "$defs": {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)}
            | {"d40": {"type": "null"}},
            "$ref": "#/$defs/d0",
        }
    },
    {
        "json_schema": {
            "allOf": [{"anyOf": [{"minimum": i}, {"maximum": j}]} for i in range(7) for j in range(7)]
        }
    },
    {"json_schema": {"allOf": [{"oneOf": [{"const": i}, {"const": -i}]} for i in range(30)]}},
    {"json_schema": {"type": "string", "pattern": "(a{1000}){1000}"}},
    {"json_schema": {"type": "string", "pattern": "(a|aa)*b" * 200}},
    {"json_schema": {"type": "string", "minLength": 10**9}},
    {"json_schema": {"type": "array", "minItems": 10**9, "items": {}}},
    {"json_schema": {"type": "integer", "minimum": 10**30, "maximum": 10**300}},
    {"json_schema": {"type": "number", "multipleOf": 1e-300}},
    {"json_schema": {"type": "object", "minProperties": 10**9}},
    {"json_schema": {"enum": [f"{'é' * 60}{i}" for i in range(3000)]}},
    {"json_schema": {"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(5000)}}},
    {"json_schema": {"type": "é" * 200}},
    {"regex": "(" * 100_000},
    {"regex": "(" * 200 + "a" + ")" * 200},
    {"regex": "((((a{99}){99}){99}){99}){99}"},
    {"regex": r"(\p{L}{0,500}\d){500}"},
    {"regex": "[^a]*" * 5000},
    {"regex": "(a|b|ab)*c(a|b){0,400}"},
    {"grammar": "start: " + "(" * 50_000},
    {"grammar": "start: " + "(" * 1000 + '"a"' + ")" * 1000},
    {"grammar": "start: a\n" + "\n".join(f"a{'b' * i}: a{'b' * (i + 1)}" for i in range(200))},
    {"grammar": "start: start start | start | "},
    {"grammar": 'start: start start start | "a"'},
    {"grammar": 'start: "a"{1000000}'},
    {"grammar": "start: %json " + "{" * 5000},
    {"grammar": 'start: %regex { "substring_chars": "' + "ab" * 20_000 + '" }'},
    {"grammar": "start: <|end|>"},
    {"grammar": "start: <[0-300]>"},
    {"grammar": "start: " + "a" * 900_000},
    {"choice": [f"{i}" * 40 for i in range(9000)]},
]


@pytest.mark.parametrize("index", range(len(HOSTILE)))
def test_hostile_constraints_are_bounded(llm, index):
    began = time.monotonic()
    try:
        out = llm.generate("the", temperature=1.0, seed=1, max_new_tokens=60, timeout=5, **HOSTILE[index])
    except (ValueError, candle_llama.GenerationError) as error:
        out = error
    if isinstance(out, Exception):
        assert len(str(out)) < 1500
    else:
        assert out.finish_reason in ("stop", "length", "timeout")
    assert time.monotonic() - began < 12
    assert llm.generate("the", choice=["world"]).text == "world"


def test_params_with_constraints_are_values():
    for given in ({"json_schema": Owner}, {"json_schema": SCHEMAS[-1]}, {"choice": ["a"]}, {"regex": "a"}):
        params = SamplingParams(**given)
        assert pickle.loads(pickle.dumps(params)) == params == SamplingParams(**given)
        assert hash(params) == hash(SamplingParams(**given))
        again = pickle.loads(pickle.dumps(params)).json_schema
        assert getattr(again, "model", None) == getattr(params.json_schema, "model", None)


def test_a_tokenizer_whose_tokens_have_no_bytes_refuses(tmp_path):
    folder = checkpoints.write_checkpoint(tmp_path / "odd")
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": False}
    file.write_text(json.dumps(tokenizer))
    with pytest.warns(UserWarning, match="cannot be streamed"):
        llm = candle_llama.load(folder)
    with llm, pytest.raises(candle_llama.UnsupportedModelError, match="bytes of its own"):
        llm.generate("the", choice=["a"])


def test_the_command_answers_in_json(command, tiny):
    result = command("generate", tiny, "the", "--json", "--json-schema", '{"enum": [{"a": 1}]}')
    assert json.loads(result.stdout)["parsed"] == {"a": 1}
    result = command("generate", tiny, "the", "--choice", "yes", "--choice", "no")
    assert result.stdout.strip() in ("yes", "no")
    result = command("generate", tiny, "the", "--regex", "a", "--choice", "no")
    assert result.returncode in (1, 2)
    assert "give only one of regex, choice" in result.stderr
