"""Reading config.json: both generations of transformers, and what is refused, by family, field and value."""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import json
import re
import tokenize
from dataclasses import MISSING, fields
from io import StringIO
from typing import Any

import pytest
from model_cases import BASE, CASES, LING_2, Case, Config
from transformers import DbrxConfig, Glm4MoeConfig, GraniteMoeConfig, Qwen2MoeConfig

from moefast.models import FAMILIES, get_classes
from moefast.models.config import BaseArgs

families = pytest.mark.parametrize("family", FAMILIES)

# Bailing has no class in transformers: its code comes with the checkpoint.
TRANSFORMERS: dict[str, Any] = {
    "granitemoe": GraniteMoeConfig,
    "glm4_moe": Glm4MoeConfig,
    "qwen2_moe": Qwen2MoeConfig,
    "dbrx": DbrxConfig,
}


def args_of(config: Config) -> Any:
    return get_classes(config)[1].from_dict(config)


def build(config: Config) -> Any:
    model_class, args_class = get_classes(config)
    return model_class(args_class.from_dict(config))


def meaning(args: Any) -> Any:
    """What is to be equal: the arguments; for DBRX, whose sections hold more than is read, what is read."""
    if args.model_type != "dbrx":
        return args
    read = ("vocab_size", "d_model", "n_layers", "n_heads", "max_seq_len", "rope_scaling")
    derived = ("theta", "kv_heads", "clip_qkv", "ffn_width")
    return {name: getattr(args, name) for name in (*read, *derived)} | {"router": args.router_spec()}


def in_transformers(case: Case) -> bool:
    # The class insists on shared and routed experts.
    counts = (case.config.get(name, 1) for name in ("n_shared_experts", "n_routed_experts"))
    return case.family in TRANSFORMERS and None not in counts


@pytest.mark.parametrize("case", [case for case in CASES if in_transformers(case)], ids=str)
def test_transformers_5_writes_the_same_model(case: Case) -> None:
    former = case.config if case.family == "dbrx" else {"max_position_embeddings": 512, **case.config}
    written = TRANSFORMERS[case.family](**copy.deepcopy(former)).to_dict()
    assert "rope_parameters" in written
    assert "rope_scaling" not in written
    read = args_of(json.loads(json.dumps(written)))
    assert meaning(read) == meaning(args_of(former))
    build(written)


@pytest.mark.parametrize(
    "scaling", [None, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}]
)
@families
def test_rope_parameters_mean_what_their_parts_meant(family: str, scaling: Config | None) -> None:
    former = {**BASE[family], "rope_scaling": scaling}
    if family == "dbrx":
        former["attn_config"] = {**former["attn_config"], "rope_theta": None}
        former["rope_theta"] = 10000.0
    later = {**former, "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": 10000.0}}
    del later["rope_theta"], later["rope_scaling"]
    if "partial_rotary_factor" in former:
        later["rope_parameters"]["partial_rotary_factor"] = later.pop("partial_rotary_factor")
    assert args_of(later) == args_of(former)
    # A file that has both, for both generations of readers.
    assert args_of({**former, "rope_parameters": later["rope_parameters"]}) == args_of(former)


def test_dbrx_keeps_its_own_theta() -> None:
    # transformers 5 adds its default of 10000 to an original configuration, whose theta is in attn_config.
    attention = {"clip_qkv": 8, "kv_n_heads": 2, "rope_theta": 500000.0}
    config = DbrxConfig(**{**BASE["dbrx"], "attn_config": attention}).to_dict()
    assert config["rope_parameters"]["rope_theta"] == 10000.0
    assert args_of(config).theta == 500000.0


@pytest.mark.parametrize(
    ("family", "settings", "words"),
    [
        ("granitemoe", {"rope_parameters": {"rope_theta": 5.0}}, ("rope_theta", "5.0", "10000.0")),
        (
            "glm4_moe",
            {"rope_parameters": {"partial_rotary_factor": 1.0}},
            ("partial_rotary_factor", "1.0", "0.5"),
        ),
        (
            "qwen2_moe",
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
            ("rope_scaling", "linear"),
        ),
        (
            "bailing_moe",
            {
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "linear", "factor": 4.0},
            },
            ("rope_scaling", "2.0", "4.0"),
        ),
        ("dbrx", {"rope_theta": 5.0}, ("rope_theta", "5.0", "10000.0")),
        (
            "qwen2_moe",
            {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}},
            ("all layers", "full_attention"),
        ),
    ],
)
def test_contradictions_are_refused(family: str, settings: Config, words: tuple[str, ...]) -> None:
    assert_refused({**BASE[family], **settings}, words)


def _in(section: str, **settings: Any) -> Config:
    return {section: {**BASE["dbrx"][section], **settings}}


_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}

UNSUPPORTED = [
    ("granitemoe", {"hidden_act": "gelu"}, ("hidden_act", "'gelu'")),
    ("granitemoe", {"partial_rotary_factor": 0.5}, ("partial_rotary_factor", "0.5")),
    ("granitemoe", {"head_dim": 15}, ("rotated dimensions", "15")),
    ("granitemoe", {"num_key_value_heads": 3}, ("4 query heads", "3")),
    ("granitemoe", {"num_experts_per_tok": 9}, ("num_experts_per_tok", "1..8", "9")),
    ("glm4_moe", {"hidden_act": "relu"}, ("hidden_act", "'relu'")),
    ("glm4_moe", {"scoring_func": "softmax"}, ("scoring_func", "'softmax'")),
    ("glm4_moe", {"topk_method": "greedy"}, ("topk_method", "'greedy'")),
    ("glm4_moe", {"n_group": 3, "topk_group": 1}, ("n_group", "n_routed_experts=8", "3")),
    ("glm4_moe", {"n_group": 2, "topk_group": 3}, ("topk_group", "n_group=2", "3")),
    ("glm4_moe", {"n_group": 8, "topk_group": 2}, ("two experts per group", "8")),
    ("qwen2_moe", {"hidden_act": "gelu"}, ("hidden_act", "'gelu'")),
    ("qwen2_moe", {"use_sliding_window": True}, ("use_sliding_window", "True")),
    ("qwen2_moe", {"layer_types": ["sliding_attention"] * 2}, ("layer_types", "sliding_attention")),
    ("qwen2_moe", {"num_experts_per_tok": 0}, ("num_experts_per_tok", "0")),
    ("bailing_moe", {"hidden_act": "gelu"}, ("hidden_act", "'gelu'")),
    ("bailing_moe", {"score_function": "tanh"}, ("score_function", "'tanh'")),
    ("bailing_moe", {"norm_softmax": True}, ("norm_softmax", "True")),
    (
        "bailing_moe",
        {"norm_head": True, "tie_word_embeddings": True},
        ("norm_head", "tie_word_embeddings", "True"),
    ),
    ("bailing_moe", {"use_sliding_window": True}, ("use_sliding_window", "True")),
    (
        "bailing_moe",
        {"moe_router_enable_routed_scaling": False, "routed_scaling_factor": 2.5},
        ("moe_router_enable_routed_scaling", "False"),
    ),
    ("bailing_moe", {**LING_2, "topk_group": 5}, ("topk_group", "n_group=4", "5")),
    ("bailing_moe", {"num_key_value_heads": 0}, ("4 query heads", "0")),
    ("dbrx", {"tie_word_embeddings": True}, ("tie_word_embeddings", "True")),
    ("dbrx", _in("ffn_config", moe_normalize_expert_weights=2), ("moe_normalize_expert_weights", "2")),
    ("dbrx", _in("ffn_config", ffn_act_fn={"name": "gelu"}), ("ffn_act_fn", "'gelu'")),
    ("dbrx", _in("ffn_config", moe_top_k=5), ("ffn_config.moe_top_k", "1..4", "5")),
    ("dbrx", _in("ffn_config", moe_top_k=None), ("ffn_config", "moe_top_k")),
    ("dbrx", _in("ffn_config", moe_num_experts=None), ("ffn_config", "moe_num_experts")),
    ("dbrx", _in("ffn_config", ffn_hidden_size=None), ("ffn_config", "ffn_hidden_size")),
    ("dbrx", _in("attn_config", kv_n_heads=None), ("attn_config", "kv_n_heads")),
    ("dbrx", _in("attn_config", rope_theta=None), ("rope_theta", "None")),
    # Rotary embeddings are made in one place: any family will do for their numbers.
    ("granitemoe", {"rope_scaling": {"type": "linear"}}, ("linear", "factor")),
    ("granitemoe", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, ("original_max_position_embeddings",)),
    ("granitemoe", {"rope_scaling": {"type": "llama3", "factor": 4.0}}, ("low_freq_factor",)),
    ("granitemoe", {"rope_scaling": {**_YARN, "truncate": False}}, ("truncate", "False")),
    ("granitemoe", {"rope_scaling": {**_YARN, "mscale": 0.7}}, ("mscale", "0.7")),
    ("granitemoe", {"rope_scaling": {**_YARN, "mscale_all_dim": 0.7}}, ("mscale_all_dim", "0.7")),
    ("qwen2_moe", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ("max_position_embeddings", "None")),
    *(
        (family, {"rope_scaling": {"rope_type": kind, "factor": 2.0}}, ("rope_scaling", f"'{kind}'"))
        for family in FAMILIES
        for kind in ("longrope", "mrope", "su")
    ),
]


@pytest.mark.parametrize(
    ("family", "settings", "words"), UNSUPPORTED, ids=[f"{row[0]}-{'-'.join(row[2])}" for row in UNSUPPORTED]
)
def test_unsupported_settings_are_refused(family: str, settings: Config, words: tuple[str, ...]) -> None:
    assert_refused({**BASE[family], **settings}, words)


def assert_refused(config: Config, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=rf"^\[{config['model_type']}\] .*\.$") as refused:
        build(config)
    for word in words:
        assert word in str(refused.value)


@families
def test_missing_fields_are_named(family: str) -> None:
    args_class: type[BaseArgs] = get_classes(BASE[family])[1]
    required = [f for f in fields(args_class) if f.default is MISSING and f.default_factory is MISSING]
    assert len(required) > 4
    for f in required:
        if f.name == "model_type":
            continue
        without = {k: v for k, v in BASE[family].items() if k != f.name}
        assert_refused(without, (f"'{f.name}'",))
        if "None" not in f.type:
            assert_refused({**BASE[family], f.name: None}, (f"'{f.name}'",))


@families
def test_other_names_of_fields(family: str) -> None:
    args_class: type[BaseArgs] = get_classes(BASE[family])[1]
    for name, aliases in args_class.ALIASES.items():
        for alias in aliases:
            config = dict(BASE[family])
            config[alias] = config.pop(name)
            assert args_of(config) == args_of(BASE[family])


@families
def test_a_null_is_no_entry(family: str) -> None:
    args_class: type[BaseArgs] = get_classes(BASE[family])[1]
    optional = [f.name for f in fields(args_class) if f.default is not MISSING and f.name not in BASE[family]]
    assert args_of({**BASE[family], **dict.fromkeys(optional)}) == args_of(BASE[family])


def test_unknown_models_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[load\] model_type must be one of .*, got 'mixtral'\."):
        get_classes({"model_type": "mixtral"})


@families
def test_every_field_is_explained(family: str) -> None:
    source = inspect.getsource(importlib.import_module(f"moefast.models.{family}"))
    comments = {
        token.start[0]
        for token in tokenize.generate_tokens(StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    args = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "ModelArgs")
    declared = [n for n in args.body if isinstance(n, ast.AnnAssign) and "ClassVar" not in ast.dump(n)]
    assert len(declared) == len(fields(get_classes({"model_type": family})[1]))
    for node in declared:
        name = ast.unparse(node.target)
        if name != "model_type":
            assert comments & {node.lineno - 1, node.lineno}, f"{family}.ModelArgs.{name} has no comment"


@families
def test_every_model_names_its_source(family: str) -> None:
    module = importlib.import_module(f"moefast.models.{family}")
    assert re.search(r"arXiv:\d{4}\.\d{5}", module.__doc__ or "")
    assert "*Architecture.*" in (module.__doc__ or "")
    assert "*Quantization.*" in (module.__doc__ or "")
