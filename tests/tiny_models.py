"""Tiny random language models of many families, and tokenizers for them."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from maskopt.models.structured.blocks import EVERY

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCABULARY = 96
_SIZE = {"vocab_size": VOCABULARY, "hidden_size": 32}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
SHARED = {**_SIZE, "intermediate_size": 48, "num_hidden_layers": 3, **_HEADS}
_NO_GQA = {**SHARED, "num_key_value_heads": 4}
_OLD = {k: v for k, v in SHARED.items() if k != "num_key_value_heads"}
_GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
_MOE = {"num_experts_per_tok": 2}
_HEAD = {**SHARED, "head_dim": 8}
_PAD = {**SHARED, "pad_token_id": 0}
_LATENT = {**_NO_GQA, "q_lora_rank": 16, "kv_lora_rank": 16, "n_routed_experts": 4, "v_head_dim": 8}
_LATENT |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]

#: name → (configuration class, arguments)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SHARED),
    "qwen2": ("Qwen2Config", SHARED),
    "qwen3": ("Qwen3Config", _HEAD),
    "mistral": ("MistralConfig", SHARED),
    "gemma": ("GemmaConfig", _HEAD),
    "gemma3": ("Gemma3TextConfig", {**_HEAD, "sliding_window": 8, "layer_types": _SLIDING}),
    "gpt2": ("GPT2Config", _GPT),
    "opt": ("OPTConfig", {**_OLD, "ffn_dim": 48, "word_embed_proj_dim": 16}),
    "phi": ("PhiConfig", _NO_GQA),
    "phi3": ("Phi3Config", _PAD),
    "gpt_neox": ("GPTNeoXConfig", _OLD),
    "falcon": ("FalconConfig", {**_OLD, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_alibi": ("FalconConfig", {**_OLD, "alibi": True, "multi_query": True}),
    "bloom": ("BloomConfig", {**_SIZE, "n_layer": 3, "n_head": 4}),
    "cohere": ("CohereConfig", _PAD),
    "olmo2": ("Olmo2Config", SHARED),
    "stablelm": ("StableLmConfig", {**SHARED, "use_qkv_bias": True}),
    "glm": ("GlmConfig", {**_HEAD, "pad_token_id": 0}),
    # multiplies one weight from the left
    "mamba": ("MambaConfig", {**_SIZE, "num_hidden_layers": 3, "state_size": 4}),
    "bamba": ("BambaConfig", {  # its blocks return two values
        **SHARED, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1,
        "mamba_d_state": 8,
    }),
    "mixtral": ("MixtralConfig", {**SHARED, **_MOE, "num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeConfig", {
        **_HEAD, **_MOE, "num_experts": 4, "moe_intermediate_size": 16, "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
    }),
    "deepseek_v3": ("DeepseekV3Config", {  # latent attention, shared experts, a first block without experts
        **_LATENT, **_MOE, "moe_intermediate_size": 16, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "n_group": 1, "topk_group": 1,
    }),
    "llama4": ("Llama4TextConfig", {  # all experts in one product
        **_HEAD, "num_experts_per_tok": 1, "num_local_experts": 4, "intermediate_size_mlp": 48,
        "interleave_moe_layer_step": 2, "attention_chunk_size": 8, "pad_token_id": 0,
    }),
    "longcat_flash": ("LongcatFlashConfig", {  # some experts pass their tokens on; two attentions in a block
        **_LATENT, "num_layers": 2, "ffn_hidden_size": 48, "head_dim": 8, "zero_expert_num": 2, "moe_topk": 2,
        "expert_ffn_hidden_size": 16,
    }),
    # experts in attention, one 3-D parameter a module
    "jetmoe": ("JetMoeConfig", {**SHARED, **_MOE, "num_local_experts": 4, "kv_channels": 8}),
    "gpt_oss": ("GptOssConfig", {**_HEAD, **_MOE, "num_local_experts": 4, "sliding_window": 8}),
}  # fmt: skip


def tiny(family: str, *, layers: int | None = None, dtype: torch.dtype | None = None) -> Any:
    """A random model of the family, always the same one."""
    name, arguments = FAMILIES[family]
    config = getattr(transformers, name)(**arguments)
    if layers is not None and family != "longcat_flash":  # which has one
        config.num_hidden_layers = layers
        if "layer_types" in vars(config):
            config.layer_types = config.layer_types[:layers]
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # initial biases are zero; real ones are not
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.05)
    return model.to(dtype or torch.float32).eval()


def tiny_vision(layers: int = 4) -> Any:
    """A Gemma 3 whose vision tower numbers as many blocks of its own."""
    text = {**FAMILIES["gemma3"][1], "num_hidden_layers": layers}
    text["layer_types"] = ["sliding_attention", "full_attention"] * (layers // 2)
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": layers}
    vision |= {"image_size": 28, "num_attention_heads": 2, "patch_size": 14}
    ids: dict[str, Any] = {"image_token_index": 95, "boi_token_index": 94, "eoi_token_index": 93}
    parts: dict[str, Any] = {"text_config": text, "vision_config": vision, "mm_tokens_per_image": 4}
    return AutoModelForCausalLM.from_config(transformers.Gemma3Config(**parts, **ids)).eval()


def tokens(samples: int = 6, length: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (samples, length), generator=generator)


def loud(family: str, dtype: torch.dtype = torch.float32, *, layers: int | None = None) -> Any:
    """A tiny model whose predictions are not all alike: initial weights are small."""
    model = tiny(family, layers=layers, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model


def save(model: Any, folder: Path, *, shard: str = "5GB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


class WordTokenizer:
    """Every character a token: enough for what the pipeline asks of a tokenizer."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % VOCABULARY for c in text]}


def save_with_own_code(folder: Path) -> Path:
    """A model whose configuration asks to run code that lies beside it."""
    own = {"AutoModelForCausalLM": "modeling_own.Own"}
    edit_json(save(tiny("llama"), folder) / "config.json", lambda c: c.update(auto_map=own))
    code = "from transformers import LlamaForCausalLM\n\n\nclass Own(LlamaForCausalLM):\n    pass\n"
    (folder / "modeling_own.py").write_text(code)
    return folder


def _characters(special: dict[str, int]) -> tuple[Any, type[Any]]:
    """Tokens of one character each and special ones, and what wraps them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = [chr(c) for c in range(32, 31 + VOCABULARY - len(special))]
    vocabulary = {c: i + 1 for i, c in enumerate(characters)} | {"?unk": 0} | special
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="?unk"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return inner, PreTrainedTokenizerFast


def save_tokenizer(folder: Path) -> None:
    """A real fast tokenizer of the tiny vocabulary, one token a character."""
    inner, kind = _characters({})
    kind(tokenizer_object=inner, unk_token="?unk").save_pretrained(folder)


#: BOS, then each message as "<role>content</s>"; user and assistant take turns
CHAT_TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {{- '<' + message.role + '>' + message.content + eos_token }}
{%- endfor %}"""
CHAT_BOS, CHAT_EOS = VOCABULARY - 2, VOCABULARY - 1


def chat_tokenizer(template: str | None = CHAT_TEMPLATE) -> Any:
    """As that of `save_tokenizer`, with a chat template, and a BOS token that it puts before a text."""
    from tokenizers import processors

    inner, kind = _characters({"<s>": CHAT_BOS, "</s>": CHAT_EOS})
    first = [("<s>", CHAT_BOS)]
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=first)
    words = {"unk_token": "?unk", "bos_token": "<s>", "eos_token": "</s>"}
    return kind(tokenizer_object=inner, chat_template=template, **words)


def patched(model: Any, name: str, change: Callable[[torch.Tensor], object]) -> Any:
    with torch.no_grad():
        change(model.get_parameter(name))
    return model


def overflowing() -> Any:
    """A Llama in which token 5 alone reaches the first input of an enormous weight."""
    model = tiny("llama")
    first, embedding = model.model.layers[0], model.model.embed_tokens.weight
    with torch.no_grad():
        embedding[:, 0] = first.self_attn.o_proj.weight[0] = 0
        embedding[5, 0], first.mlp.up_proj.weight[0, 0] = 10, 3e38
    return model


class Routed(nn.Module):
    """Experts one by one, as in much code that comes with a model: some get no token of a window."""

    def __init__(self, expert: nn.Module, width: int, count: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(copy.deepcopy(expert) for _ in range(count))
        self.gate = nn.Linear(width, count, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        share, chosen = self.gate(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            here = chosen == number
            if bool(here.any()):
                out[here] = share[here][:, None] * expert(x[here])
        return out


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def reload(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True).eval()


def logits_of(model: Any, data: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(data, use_cache=False).logits)


def cross_entropy(model: Any, data: Tensor) -> float:
    """By definition: one forward pass of the whole model, float64."""
    logits = logits_of(model, data)[:, :-1].double()
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), data[:, 1:].flatten()))


def logs(model: nn.Module, ids: torch.Tensor, every: int = EVERY) -> torch.Tensor:
    return torch.log_softmax(logits_of(model, ids)[:, every - 1 :: every].double(), -1)


def inputs_of(model: Any, name: str, data: Tensor) -> Tensor:
    """What a linear layer is given, [tokens, n], float64."""
    seen: list[Tensor] = []
    watch = lambda _, args: seen.append(args[0].detach().flatten(0, 1))  # noqa: E731
    hook = model.get_submodule(name).register_forward_pre_hook(watch)
    for window in data:
        logits_of(model, window[None])
    hook.remove()
    return torch.cat(seen).double()
