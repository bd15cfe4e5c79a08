"""Small models of images, and of images and text, on the meta device. Patches have 14 x 14 pixels, or 588 inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .encoders import encoder
from .language import HEAD, build, decoder
from .sizes import POSITIONS, VOCABULARY

_IMAGE = {"image_size": 42, "patch_size": 14}


def tower(width: int, **fields: Any) -> dict[str, Any]:
    """Return the fields that most vision encoders share."""
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": width // HEAD,
        "num_labels": 10,
    } | (_IMAGE | fields)


def vit(width: int) -> nn.Module:
    return build("ViTConfig", "ViTForImageClassification", **tower(width))


def vit_mae(width: int) -> nn.Module:
    # The decoder has one width in the whole family.
    small = {"decoder_hidden_size": 320, "decoder_intermediate_size": 1280, "decoder_num_attention_heads": 5}
    return build("ViTMAEConfig", "ViTMAEForPreTraining", **tower(width, decoder_num_hidden_layers=1, **small))


def dinov2(width: int) -> nn.Module:
    return build("Dinov2Config", "Dinov2ForImageClassification", **tower(width))


def dinov3(width: int) -> nn.Module:
    return build("DINOv3ViTConfig", "DINOv3ViTModel", **tower(width, num_register_tokens=4))


def siglip(width: int) -> nn.Module:
    text = encoder(width, projection_size=width)
    return build("SiglipConfig", "SiglipModel", text_config=text, vision_config=tower(width))


def siglip2(width: int) -> nn.Module:
    # A patch has 16 * 16 * 3 = 768 inputs, as in the original: one of the widths is 768 too.
    text = encoder(width, projection_size=width)
    vision = tower(width, patch_size=16, num_patches=9)
    del vision["image_size"]
    return build("Siglip2Config", "Siglip2Model", text_config=text, vision_config=vision)


def clip(width: int) -> nn.Module:
    fields = {"text_config": encoder(width), "vision_config": tower(width), "projection_dim": width}
    return build("CLIPConfig", "CLIPModel", **fields)


def llava_next(width: int) -> nn.Module:
    # The vision tower is trained already, so it does not follow the width.
    text = decoder(width, 3.5) | {"model_type": "mistral"}
    vision = tower(320) | {"model_type": "clip_vision_model", "projection_dim": 320}
    return build(
        "LlavaNextConfig",
        "LlavaNextForConditionalGeneration",
        text_config=text,
        vision_config=vision,
        image_token_index=5,
        image_grid_pinpoints=[[42, 42]],
        tie_word_embeddings=False,
    )


def qwen2_vl(width: int) -> nn.Module:
    # All sizes of the family have one vision tower.
    rope = {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e6}
    text = decoder(width, 5.25, rope_parameters=rope)
    vision = {"depth": 2, "embed_dim": 320, "hidden_size": width, "num_heads": 5, "mlp_ratio": 4, "patch_size": 14}
    return build(
        "Qwen2VLConfig",
        "Qwen2VLForConditionalGeneration",
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=False,
    )


def swin(width: int) -> nn.Module:
    fields = {"image_size": 56, "patch_size": 4, "window_size": 7, "depths": [1, 1], "num_labels": 10}
    sizes = {"embed_dim": width // 2, "num_heads": [width // HEAD, 2 * width // HEAD]}
    return build("SwinConfig", "SwinForImageClassification", **fields, **sizes)


def convnext(width: int) -> nn.Module:
    fields = {"num_stages": 3, "depths": [1, 1, 1], "num_labels": 10}
    return build(
        "ConvNextConfig", "ConvNextForImageClassification", **fields, hidden_sizes=[width // 4, width // 2, width]
    )


def segformer(width: int) -> nn.Module:
    return build(
        "SegformerConfig",
        "SegformerForSemanticSegmentation",
        depths=[1, 1, 1, 1],
        hidden_sizes=[width // 8, width // 4, 5 * width // 8, width],
        num_attention_heads=[1, 2, 5, 8],
        decoder_hidden_size=width,
        num_labels=10,
    )


def resnet50(width: int) -> nn.Module:
    from torchvision.models.resnet import Bottleneck, ResNet

    with torch.device("meta"):
        return ResNet(Bottleneck, [1, 1, 1, 1], num_classes=10, width_per_group=width // 4)


def efficientnet(width: int) -> nn.Module:
    from torchvision.models.efficientnet import EfficientNet, MBConvConfig

    wide = width / 256
    blocks = [(1, 3, 1, 32, 16), (6, 3, 2, 16, 24), (6, 5, 2, 24, 40)]
    settings = [
        MBConvConfig(expand, kernel, stride, into, out, 1, wide, 1.0) for expand, kernel, stride, into, out in blocks
    ]
    with torch.device("meta"):
        return EfficientNet(settings, dropout=0.2, num_classes=10)


def vgg(width: int) -> nn.Module:
    from torchvision.models.vgg import VGG, make_layers

    with torch.device("meta"):
        model = VGG(make_layers([width // 4, "M", width // 2, "M", width, "M"]), num_classes=10, init_weights=False)
        # The class has one width only.
        model.classifier[0] = nn.Linear(width * 7 * 7, 8 * width)
        model.classifier[3] = nn.Linear(8 * width, 8 * width)
        model.classifier[6] = nn.Linear(8 * width, 10)
    return model


def timm_vit(width: int) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    with torch.device("meta"):
        return VisionTransformer(
            img_size=42, patch_size=14, num_classes=10, embed_dim=width, depth=2, num_heads=width // HEAD
        )


def timm_siglip(width: int) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    with torch.device("meta"):
        return VisionTransformer(
            img_size=42,
            patch_size=14,
            num_classes=10,
            embed_dim=width,
            depth=2,
            num_heads=width // HEAD,
            class_token=False,
            global_pool="map",
        )


def timm_swin(width: int) -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer

    with torch.device("meta"):
        return SwinTransformer(
            img_size=56,
            num_classes=10,
            embed_dim=width // 2,
            depths=(1, 1),
            num_heads=(width // HEAD, 2 * width // HEAD),
        )


def timm_mixer(width: int) -> nn.Module:
    from timm.models.mlp_mixer import MlpMixer

    with torch.device("meta"):
        return MlpMixer(num_classes=10, img_size=42, patch_size=14, num_blocks=2, embed_dim=width)


def timm_convnext(width: int) -> nn.Module:
    from timm.models.convnext import ConvNeXt

    with torch.device("meta"):
        return ConvNeXt(num_classes=10, depths=(1, 1, 1, 1), dims=(width // 8, width // 4, width // 2, width))


def open_clip(width: int) -> nn.Module:
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(layers=2, width=width, head_width=HEAD, patch_size=14, image_size=42)
    text = CLIPTextCfg(context_length=POSITIONS, vocab_size=VOCABULARY, width=width, heads=width // HEAD, layers=2)
    with torch.device("meta"):
        return CLIP(embed_dim=width, vision_cfg=vision, text_cfg=text)


VISION: dict[str, Callable[[int], nn.Module]] = {
    function.__name__: function
    for function in (
        vit,
        vit_mae,
        dinov2,
        dinov3,
        siglip,
        siglip2,
        clip,
        llava_next,
        qwen2_vl,
        swin,
        convnext,
        segformer,
        resnet50,
        efficientnet,
        vgg,
        timm_vit,
        timm_siglip,
        timm_swin,
        timm_mixer,
        timm_convnext,
        open_clip,
    )
}
