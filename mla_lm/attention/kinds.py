"""The kinds of attention. A new one takes a file beside this one, its line here, and presets in conf/model/."""

from dataclasses import dataclass

from mla_lm.attention import gqa, mla
from mla_lm.attention.kind import AttentionKind, SharedOptions

KINDS: dict[str, AttentionKind] = {
    "mla": mla.KIND,
    "mha": gqa.MHA_KIND,
    "gqa": gqa.GQA_KIND,
    "mqa": gqa.MQA_KIND,
}


@dataclass
class AttentionConfig(mla.MLAOptions, gqa.GQAOptions, SharedOptions):
    """The keys of `model.attention`: `kind`, and the options of all kinds, of which one kind reads its own."""
