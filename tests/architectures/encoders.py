"""Small encoders and encoder-decoders of transformers for text and sound, on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .language import HEAD, build
from .sizes import POSITIONS, VOCABULARY


def encoder(width: int, **fields: Any) -> dict[str, Any]:
    """Return the fields that most encoders share."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": width // HEAD,
        "max_position_embeddings": POSITIONS,
        "num_labels": 3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | fields


def bert(width: int) -> nn.Module:
    # 512 positions, as in the original: one of the widths is 512 too.
    return build("BertConfig", "BertForPreTraining", **encoder(width, max_position_embeddings=512))


def bert_classifier(width: int) -> nn.Module:
    return build("BertConfig", "BertForSequenceClassification", **encoder(width, max_position_embeddings=512))


def roberta(width: int) -> nn.Module:
    return build("RobertaConfig", "RobertaForMaskedLM", **encoder(width))


def roberta_classifier(width: int) -> nn.Module:
    return build("RobertaConfig", "RobertaForSequenceClassification", **encoder(width))


def distilbert(width: int) -> nn.Module:
    sizes = {"dim": width, "hidden_dim": 4 * width, "n_layers": 2, "n_heads": width // HEAD}
    return build(
        "DistilBertConfig",
        "DistilBertForMaskedLM",
        vocab_size=VOCABULARY,
        max_position_embeddings=POSITIONS,
        **sizes,
    )


def albert(width: int) -> nn.Module:
    # All sizes of ALBERT have embeddings of size 128.
    return build("AlbertConfig", "AlbertForMaskedLM", **encoder(width, embedding_size=128))


def modernbert(width: int) -> nn.Module:
    fields = encoder(width, intermediate_size=3 * width // 2, cls_token_id=1, sep_token_id=2)
    return build("ModernBertConfig", "ModernBertForMaskedLM", **fields)


def deberta_v2(width: int) -> nn.Module:
    positions = {"relative_attention": True, "position_buckets": 10, "pos_att_type": ["p2c", "c2p"]}
    return build("DebertaV2Config", "DebertaV2ForSequenceClassification", **encoder(width, **positions))


def t5(width: int) -> nn.Module:
    # T5 1.1, which is gated. The package ties its head always.
    sizes = {"d_model": width, "d_ff": 5 * width // 2, "d_kv": HEAD, "num_heads": width // HEAD}
    return build(
        "T5Config",
        "T5ForConditionalGeneration",
        vocab_size=VOCABULARY,
        num_layers=2,
        num_decoder_layers=2,
        feed_forward_proj="gated-gelu",
        **sizes,
    )


def bart(width: int) -> nn.Module:
    heads, inner = width // HEAD, 4 * width
    return build(
        "BartConfig",
        "BartForConditionalGeneration",
        vocab_size=VOCABULARY,
        max_position_embeddings=POSITIONS,
        d_model=width,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=inner,
        decoder_ffn_dim=inner,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def whisper(width: int) -> nn.Module:
    heads, inner = width // HEAD, 4 * width
    return build(
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        vocab_size=VOCABULARY,
        num_mel_bins=80,
        max_source_positions=60,
        max_target_positions=44,
        d_model=width,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=inner,
        decoder_ffn_dim=inner,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )


def wav2vec2(width: int) -> nn.Module:
    # The feature extractor is the same in the base and in the large model.
    fields = encoder(width, conv_dim=(160,) * 3, conv_kernel=(10, 3, 2), conv_stride=(5, 2, 2), vocab_size=VOCABULARY)
    return build("Wav2Vec2Config", "Wav2Vec2ForCTC", **fields)


def encodec(width: int) -> nn.Module:
    # Latents have one size in the whole family; the filters follow the width.
    return build(
        "EncodecConfig",
        "EncodecModel",
        num_filters=width // 8,
        upsampling_ratios=[4, 2],
        hidden_size=100,
        codebook_dim=100,
        codebook_size=64,
        num_residual_layers=1,
        num_lstm_layers=1,
        norm_type="weight_norm",
    )


ENCODERS: dict[str, Callable[[int], nn.Module]] = {
    function.__name__: function
    for function in (
        bert,
        bert_classifier,
        roberta,
        roberta_classifier,
        distilbert,
        albert,
        modernbert,
        deberta_v2,
        t5,
        bart,
        whisper,
        wav2vec2,
        encodec,
    )
}
