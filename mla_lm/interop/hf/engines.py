"""Which inference engines can load a model of this shape, by the rules in their source code as of 2026.

Each rule cites its source. None of the engines was run, and newer versions may differ.
"""

from dataclasses import dataclass

from mla_lm.attention import MLAConfig
from mla_lm.model.config import TransformerConfig

# Elements per token that vLLM's MLA backends can cache: MLACommonBackend.get_supported_head_sizes,
# https://github.com/vllm-project/vllm/blob/main/vllm/model_executor/layers/attention/mla_attention.py
# FlashMLA, CUTLASS_MLA and FlashInfer's kernels take only 576; FLASH_ATTN_MLA and TRITON_MLA (since
# https://github.com/vllm-project/vllm/pull/41119) 320 as well.
VLLM_CACHED = (320, 576)
# (nope_dim, rope_dim, value_dim) that vLLM's prefill supports: FlashAttnPrefillBackend.supports_mla_dimensions,
# https://github.com/vllm-project/vllm/pull/48855
VLLM_HEADS = ((128, 64, 128), (192, 64, 256), (64, 64, 128))
# llama.cpp assumes a model to have no low-rank query exactly if it has one of these numbers of layers: `is_lite`,
# https://github.com/ggml-org/llama.cpp/blob/master/src/models/deepseek2.cpp (48 layers too, with one vocabulary).
LLAMA_CPP_LITE = (26, 27)
# get_vocab_base_pre, https://github.com/ggml-org/llama.cpp/blob/master/conversion/base.py
LLAMA_CPP_TOKENIZER = ("its converter asks for the hash that it prints to be added to get_vocab_base_pre",)
VLLM_DTYPE = ("with --dtype bfloat16",)


@dataclass(frozen=True)
class Verdict:
    """Whether an engine can load the model (None: not checked), and notes on what to set or to change."""

    engine: str
    takes: bool | None
    notes: tuple[str, ...] = ()

    @property
    def word(self) -> str:
        return {True: "yes", False: "no", None: "not checked"}[self.takes]


def engines_for(config: TransformerConfig) -> list[Verdict]:
    """The verdict of each engine on a model that `scripts.export` can write."""
    layer = config.layer_config()
    if isinstance(layer, MLAConfig):
        slow = "it caches the latents, and expands all of them again for each new token"
        return [
            Verdict("transformers", True, (slow,)),
            _vllm_mla(layer),
            _sglang_mla(layer),
            _llama_cpp_mla(layer, config.num_layers),
        ]
    if config.use_bias or layer.rotated_dim < config.d_model // config.num_heads:
        return [Verdict("transformers", True), *(Verdict(engine, None) for engine in ("vLLM", "SGLang", "llama.cpp"))]
    return [
        Verdict("transformers", True),
        _vllm_llama(config.d_model // config.num_heads),
        Verdict("SGLang", None),
        Verdict("llama.cpp", True, LLAMA_CPP_TOKENIZER),
    ]


def _vllm_mla(layer: MLAConfig) -> Verdict:
    cached, heads = layer.kv_compressed_dim + layer.rope_dim, (layer.nope_dim, layer.rope_dim, layer.value_dim)
    notes = []
    if cached not in VLLM_CACHED:
        notes.append(f"kv_compressed_dim + rope_dim is {cached}: it takes {_or(VLLM_CACHED)}")
    if heads not in VLLM_HEADS:
        notes.append(f"(nope_dim, rope_dim, value_dim) is {heads}: it takes {_or(VLLM_HEADS)}")
    if not notes:
        return Verdict("vLLM", True, VLLM_DTYPE)
    if _vllm_head(layer.nope_dim + layer.rope_dim) and layer.value_dim <= layer.nope_dim + layer.rope_dim:
        # DeepseekV2Attention, https://github.com/vllm-project/vllm/blob/main/vllm/model_executor/models/deepseek_v2.py
        notes.append("VLLM_MLA_DISABLE=1 serves it all the same, with keys and values in the cache")
    return Verdict("vLLM", False, tuple(notes))


def _vllm_llama(head_dim: int) -> Verdict:
    if _vllm_head(head_dim):
        return Verdict("vLLM", True, VLLM_DTYPE)
    return Verdict("vLLM", None, (f"its FlashAttention takes no heads of {head_dim}",))


def _vllm_head(size: int) -> bool:
    """Whether its FlashAttention takes this head size: supports_head_size,
    https://github.com/vllm-project/vllm/blob/main/vllm/v1/attention/backends/flash_attn.py
    """
    return size % 8 == 0 and size <= 256


def _sglang_mla(layer: MLAConfig) -> Verdict:
    """The verdict of two of SGLang's backends; flashinfer, flashmla, cutlass_mla and trtllm_mla were not checked.

    triton takes the values from the loaded block of keys, so both blocks must be equally wide
    (_decode_grouped_att_m_fwd with has_mla,
    https://github.com/sgl-project/sglang/blob/main/python/sglang/srt/layers/attention/triton_ops/decode_attention.py).
    fa3, for Hopper, is FlashAttention 3 with `q_v`, whose checks are in
    https://github.com/Dao-AILab/flash-attention/blob/main/hopper/flash_api.cpp
    """
    latent, rope = layer.kv_compressed_dim, layer.rope_dim
    key_block = {576: 512, 288: 256}.get(latent + rope, _next_power_of_2(latent + rope))
    fits = {
        "triton": key_block == _next_power_of_2(latent),
        "fa3 (on Hopper)": rope <= 64 and latent <= 512 and rope % 8 == 0 and latent % 8 == 0,
    }
    if any(fits.values()):
        backends = _or([name for name, fit in fits.items() if fit])
        return Verdict("SGLang", True, (f"with --attention-backend {backends}; its other backends were not checked",))
    sizes = f"kv_compressed_dim={latent}, rope_dim={rope}"
    return Verdict("SGLang", False, (f"{sizes} fit neither its triton nor its fa3 backend: 512, 64 fit both",))


def _llama_cpp_mla(layer: MLAConfig, num_layers: int) -> Verdict:
    lite = num_layers in LLAMA_CPP_LITE
    if layer.q_compressed_dim is None and not lite:
        return Verdict(
            "llama.cpp",
            False,
            ("it supports uncompressed queries only in models of 26 or 27 layers: set q_compressed_dim",),
        )
    if layer.q_compressed_dim is not None and lite:
        return Verdict(
            "llama.cpp", False, (f"it assumes that a model of {num_layers} layers has uncompressed queries",)
        )
    return Verdict("llama.cpp", True, LLAMA_CPP_TOKENIZER)


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _or(values: tuple | list) -> str:
    return " or ".join(map(str, values))
