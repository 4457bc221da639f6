"""Small pipelines of the real diffusers classes: random weights, real tokenizers, image grids of 8 rows x 12 columns.

`pipe, call = SMALL["flux"]()` makes one and the arguments it is called with; so that it generates well under a second:
`pipe(**call, num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(7))`.
"""

from . import joint, static, unets
from .encoders import OTHER, PROMPT

SMALL = {
    builder.__name__: builder
    for builder in (
        joint.flux,
        joint.flux_distilled,
        joint.sd3,
        joint.qwen_image,
        joint.z_image,
        joint.flux_fill,
        joint.flux_kontext,
        joint.qwen_image_edit,
        joint.flux2,
        joint.chroma,
        joint.aura_flow,
        joint.cogview4,
        joint.lumina2,
        joint.hunyuan_image,
        joint.hidream,
        static.pixart_alpha,
        static.pixart_sigma,
        static.pixart_pag,
        static.sana,
        static.sana_sprint,
        static.hunyuan_dit,
        static.lumina_next,
        static.kandinsky3,
        static.kandinsky5,
        unets.animate_diff,
        unets.kolors,
        unets.pag,
        unets.deepfloyd_if,
    )
}
__all__ = ["OTHER", "PROMPT", "SMALL"]
