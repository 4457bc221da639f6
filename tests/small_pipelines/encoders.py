"""Tokenizers and text encoders of the real classes, made small: some hundred pieces, few layers, random weights.

The tokenizers split as the large ones do: the same marks of a word's start or end, the same special tokens. "burning"
is several pieces for all but CLIP's, as a word may be in any model; the other words of the two prompts are one.
"""

import json
from functools import cache

import torch
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    Gemma2Config,
    Gemma2Model,
    GemmaConfig,
    GemmaModel,
    GemmaTokenizer,
    GlmConfig,
    GlmModel,
    LlamaConfig,
    LlamaForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3Config,
    Qwen3Model,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers.processing_utils import ProcessorMixin

import attnlab as al

PROMPT = "a burning house with fire and smoke and a car"
OTHER = "a red tree"
WORDS = "a the with and on in of by red blue tree car house fire smoke night image color size user system".split()
SENTENCES = [
    *[" ".join(WORDS)] * 20,
    *[f"{word} in the {other} and the {word}" for word in WORDS for other in WORDS],
    *["burn burned turning sing"] * 3,  # "burning" is rare, so it stays several pieces
]
LETTERS = [chr(code) for code in range(33, 127)]  # what can be typed on any keyboard, but the space
CHAT = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}\
{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""
INSTRUCTIONS = """<s>{% for message in messages %}\
{% set mark = "SYSTEM_PROMPT" if message.role == "system" else "INST" %}\
[{{ mark }}]{% for part in message.content %}{{ part.text }}{% endfor %}[/{{ mark }}]{% endfor %}"""


def random_weights(model, seed=0):
    """Give a model weights that all do something, no gate at zero and no norm at exactly one, and return it."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim >= 2:
            # what comes out is as large as what goes in, or larger where the time makes scales, shifts and gates
            gain = 3 if any(part in name for part in ("norm", "adaLN", "stream_modulation")) else 1
            weight.data = gain * noise / weight[0].numel() ** 0.5
        else:
            weight.data = noise / 10 + ("norm" in name.lower() and name.endswith("weight"))
    return model.eval().requires_grad_(False)


# Tokenizers


@cache
def clip_tokenizer():
    """CLIP: byte pairs whose mark "</w>" ends a word, start and end tokens; 48 tokens at most."""
    return al.load_pipeline("tiny", device="cpu").tokenizer


def t5_tokenizer():
    """T5: sentencepiece (unigram) whose mark "▁" starts a word, an end token, no start token."""
    pieces = [(f"▁{word}", -2.0) for word in [*WORDS, "burn"]] + [("ing", -3.0)]
    special = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    vocabulary = special + pieces + [(letter, -6.0) for letter in ["▁", *LETTERS]]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=64)


@cache
def byte_pairs(mark):
    """Vocabulary {piece: number} and merges of byte pairs, learned from the sentences; mark stands for a space."""
    if mark == "Ġ":  # one sign for every byte
        splitter, alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.ByteLevel.alphabet()
    else:
        splitter, alphabet = pre_tokenizers.Metaspace(mark, prepend_scheme="never"), [mark, *LETTERS]
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = splitter
    size = len(alphabet) + 95
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(SENTENCES, trainer)
    learned = json.loads(learner.to_str())["model"]
    return learned["vocab"], [tuple(pair) for pair in learned["merges"]]


def with_special(special, pieces):
    """Vocabulary {piece: number} that begins with the special tokens."""
    return {piece: number for number, piece in enumerate([*special, *pieces])}


def qwen_tokenizer():
    """Qwen 2 and 3: byte pairs whose mark "Ġ" is the space before a word, a chat template, no start or end token."""
    vocabulary, merges = byte_pairs("Ġ")
    vision = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>", *vision],
        chat_template=CHAT,
        model_max_length=2048,
    )


class TextAndImages(Qwen2VLProcessor):
    """Qwen's processor without its part for films, which cannot be made without torchvision."""

    def __init__(self, image_processor, tokenizer):
        ProcessorMixin.__init__(self, image_processor, tokenizer)
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])


def qwen_processor(tokenizer):
    """Qwen 2.5 VL: text, and images of at most 12 patches of 4 x 4 pixels, of which four make a token."""
    pixels = {"shortest_edge": 4 * 4 * 4, "longest_edge": 12 * 4 * 4}  # the processor calls areas edges
    return TextAndImages(Qwen2VLImageProcessorPil(patch_size=4, size=pixels), tokenizer)


def gemma_tokenizer():
    """Gemma: sentencepiece (byte pairs) whose mark "▁" is the space before a word, a start token, no end token."""
    vocabulary, merges = byte_pairs("▁")
    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]  # of what no piece spells, as the end of a line
    return GemmaTokenizer(
        vocab=with_special(special, [*bytes_, *vocabulary]), merges=merges, add_bos_token=True, model_max_length=2048
    )


def byte_level_tokenizer(start, **special):
    """Tokens of bytes as in Qwen, behind the tokens that every text starts with: of GLM, Llama 3 and Mistral 3."""
    vocabulary, merges = byte_pairs("Ġ")
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(start)
    numbers = [(token, tokenizer.token_to_id(token)) for token in start]
    tokenizer.post_processor = processors.TemplateProcessing(single=[*start, "$A"], special_tokens=numbers)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def glm_tokenizer():
    """GLM 4: two start tokens, no end token."""
    start, end = ["[gMASK]", "<sop>"], "<|endoftext|>"
    special = {"pad_token": end, "eos_token": end, "extra_special_tokens": start}
    return byte_level_tokenizer(start, padding_side="left", **special)


def llama_tokenizer():
    """Llama 3: a start token, no end token; it comes without a token for padding."""
    begin = "<|begin_of_text|>"
    return byte_level_tokenizer([begin], bos_token=begin, eos_token="<|eot_id|>", model_max_length=2048)


def mistral_tokenizer():
    """Mistral 3: a start token, a chat template, padding on the left.

    FLUX.2 is published with a processor around it, which also reads images and needs torchvision, even for text alone.
    """
    marks = ["[IMG]", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    special = {f"{name}_token": f"<{sign}>" for name, sign in (("bos", "s"), ("eos", "/s"), ("pad", "pad"))}
    template = {"chat_template": INSTRUCTIONS, "extra_special_tokens": marks}
    return byte_level_tokenizer(["<s>"], padding_side="left", **special, **template)


class GLMTokenizer(PreTrainedTokenizerFast):
    """GLM 3, of Kolors: two start tokens, mark "▁" before a word, padding on the left, positions beside the tokens.

    The original reads its vocabulary with the package sentencepiece, which attnlab does not bring.
    """

    model_input_names = ("input_ids", "attention_mask", "position_ids")

    def __call__(self, *args, **options):
        encoded = super().__call__(*args, **options)
        if isinstance(encoded["attention_mask"], torch.Tensor):
            encoded["position_ids"] = (encoded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return encoded


def glm3_tokenizer():
    vocabulary, merges = byte_pairs("▁")
    start = ["[gMASK]", "sop"]
    tokenizer = Tokenizer(models.BPE(with_special(["<unk>", *start], vocabulary), merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    numbers = [(token, tokenizer.token_to_id(token)) for token in start]
    tokenizer.post_processor = processors.TemplateProcessing(single=[*start, "$A"], special_tokens=numbers)
    special = {"unk_token": "<unk>", "pad_token": "<unk>", "extra_special_tokens": start}
    return GLMTokenizer(tokenizer_object=tokenizer, padding_side="left", **special)


def bert_tokenizer():
    """BERT: word pieces whose mark "##" goes on with a word, tokens for start and end."""
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    pieces = [*WORDS, "burn", "##ing", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    return BertTokenizer(vocab=with_special(special, dict.fromkeys(pieces)), model_max_length=77)


# Text encoders. All take the tokenizer whose text they read, and the width of what they return


def clip(width, kind=CLIPTextModel, seed=0):
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=width,
        max_position_embeddings=77,  # some pipelines pad to so many whatever the tokenizer says
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return random_weights(kind(config), seed)


def t5(tokenizer, width, kind=T5EncoderModel):
    config = kind.config_class(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=2
    )
    return random_weights(kind(config))


def decoder_only(width):
    """What the configurations of language models have in common."""
    return {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": width // 2,
        "max_position_embeddings": 2048,
    }


def gemma2(tokenizer, width):
    return random_weights(Gemma2Model(Gemma2Config(vocab_size=len(tokenizer), **decoder_only(width))))


def gemma(tokenizer, width):
    return random_weights(GemmaModel(GemmaConfig(vocab_size=len(tokenizer), **decoder_only(width))))


def glm3(tokenizer, width):
    config = ChatGLMConfig(
        num_layers=3,
        padded_vocab_size=len(tokenizer),
        hidden_size=width,
        ffn_hidden_size=2 * width,
        kv_channels=width // 2,
        num_attention_heads=2,
        seq_length=256,
        add_qkv_bias=True,
        multi_query_attention=True,
        original_rope=True,
    )
    return random_weights(ChatGLMModel(config))


def bert(tokenizer, width):
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=tokenizer.model_max_length,
    )
    return random_weights(BertModel(config))


def qwen3(tokenizer, width):
    return random_weights(Qwen3Model(Qwen3Config(vocab_size=len(tokenizer), **decoder_only(width))))


def glm(tokenizer, width):
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    return random_weights(GlmModel(GlmConfig(vocab_size=len(tokenizer), **special, **decoder_only(width))))


def llama(tokenizer, width):
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(vocab_size=len(tokenizer), **special, **decoder_only(width))
    return random_weights(LlamaForCausalLM(config))


def mistral_vision(tokenizer, width):
    """Mistral 3: reads text, and images among it."""
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {"model_type": "mistral", "vocab_size": len(tokenizer), **special, **decoder_only(width)}
    vision = {"model_type": "pixtral", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"intermediate_size": 32, "image_size": 16, "patch_size": 4}
    config = Mistral3Config(
        text_config=text, vision_config=vision, image_token_index=tokenizer.convert_tokens_to_ids("[IMG]")
    )
    return random_weights(Mistral3ForConditionalGeneration(config))


def qwen_vision(tokenizer, width):
    """Qwen 2.5 VL: reads text, and images among it."""
    rotary = {"mrope_section": [1, 1, width // 4 - 2], "rope_type": "default", "rope_theta": 1e6}  # time, row, column
    text = decoder_only(width) | {"vocab_size": len(tokenizer), "rope_parameters": rotary}
    text |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    del text["head_dim"]  # this model always divides its width by the heads
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": width}
    vision |= {"patch_size": 4, "fullatt_block_indexes": [1]}
    names = ("image_pad", "vision_start", "vision_end")
    image, start, end = (tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names)
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=image,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    return random_weights(Qwen2_5_VLForConditionalGeneration(config))
