"""The registry of attention kinds. A new kind needs a file in this folder, a line here, and presets in conf/model/."""

from dataclasses import dataclass

from mla_lm.attention import gla, gqa, gta, mla, mla_qk_norm, mla_shared, mlra, tpa
from mla_lm.attention.kind import AttentionKind, SharedOptions

KINDS: dict[str, AttentionKind] = {
    "mla": mla.KIND,
    "mha": gqa.MHA_KIND,
    "gqa": gqa.GQA_KIND,
    "mqa": gqa.MQA_KIND,
    "gta": gta.KIND,
    "gla": gla.KIND,
    "mla_shared": mla_shared.KIND,
    "mla_qk_norm": mla_qk_norm.KIND,
    "tpa": tpa.KIND,
    "mlra": mlra.KIND,
}


@dataclass
class AttentionConfig(gla.LatentHeadsOptions, tpa.TPAOptions, gqa.GQAOptions, SharedOptions):
    """The keys of `model.attention`: the shared ones and the options of all kinds. Each kind reads only its own."""
