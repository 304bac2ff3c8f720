"""Reference outputs of CLIP's towers, image preprocessing and tokenizer.

    python tests/parity/networks/make_clip.py

writes clip.npz (towers: transformers' CLIPModel in Hugging Face's names, and the published architecture
on torch.nn.MultiheadAttention in OpenAI's names, both on seeded weights in float64; preprocessing on PIL)
and clip_tokenizer.json (a vocabulary trained on the captions below, and their ids).
Needs torch 2.13.0+cpu, transformers 5.23.0.
"""

import collections
import json
import pathlib

import numpy as np
import seeded
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip import CLIPImageProcessorPil

HERE = pathlib.Path(__file__).parent
IDS = [[48, 5, 6, 7, 49, 49, 49, 49, 49], [48, 1, 49, 0, 0, 0, 0, 0, 0], [48, *range(30, 37), 49]]
CAPTIONS = [
    "a photo of a cat",
    "A photo of the CAT's hat,  on\tthe mat!!",
    "they'll say: \"we've 1234 cats\" & dogs...",
    "",
    "Crème brûlée, naïve café — Ωμέγα ΣΑΣ",
    "Cre\u0301me brule\u0301e",  # combining accents: composed first
    "日本語のテキスト と 😀😀 emoji",
    "half ½ and roman Ⅳ and ² and 三",
    "a <|endoftext|> in the middle",
    "don't you're I'm it'd O'Neill's !!'s '",
    "photo " * 40,
]


def fill(manifest):
    return {key: torch.from_numpy(np.asarray(seeded.tensor(key, s))) for key, s in manifest.items()}


def hugging_face(image, ids):
    text = {"hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 50}
    text |= {"num_attention_heads": 3, "max_position_embeddings": 12, "eos_token_id": 49}
    text |= {"bos_token_id": 48}
    vision = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 4, "image_size": 24, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
    model = CLIPModel(config).eval()
    manifest = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    model.load_state_dict(fill(manifest), strict=True)
    model = model.double()
    with torch.no_grad():
        vision = model.vision_model(pixel_values=image).pooler_output
        text = model.text_model(input_ids=ids).pooler_output
        return manifest, {
            "image_pool": vision,
            "image_embedding": model.visual_projection(vision),
            "text_pool": text,
            "text_embedding": model.text_projection(text),
        }


class Layer(torch.nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.ln_2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.attn = torch.nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = torch.nn.ModuleDict(
            {
                "c_fc": torch.nn.Linear(width, 4 * width),
                "c_proj": torch.nn.Linear(4 * width, width),
            }
        )

    def forward(self, x, mask=None):
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False, attn_mask=mask)[0]
        h = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](h * torch.sigmoid(1.702 * h))


def transformer(width, heads):
    module = torch.nn.Module()
    module.resblocks = torch.nn.ModuleList([Layer(width, heads) for _ in range(2)])
    return module


class OpenAI(torch.nn.Module):
    def __init__(self):
        super().__init__()

        def parameter(*shape):
            return torch.nn.Parameter(torch.zeros(shape))

        self.visual = torch.nn.Module()
        self.visual.conv1 = torch.nn.Conv2d(3, 32, 8, 8, bias=False)
        self.visual.class_embedding = parameter(32)
        self.visual.positional_embedding = parameter(10, 32)
        self.visual.ln_pre = torch.nn.LayerNorm(32)
        self.visual.transformer = transformer(32, 4)
        self.visual.ln_post = torch.nn.LayerNorm(32)
        self.visual.proj = parameter(32, 20)
        self.token_embedding = torch.nn.Embedding(50, 24)
        self.positional_embedding = parameter(12, 24)
        self.transformer = transformer(24, 3)
        self.ln_final = torch.nn.LayerNorm(24)
        self.text_projection = parameter(24, 20)
        self.logit_scale = parameter()

    def forward(self, image, ids):
        v = self.visual
        x = v.conv1(image).flatten(2).transpose(1, 2)
        token = v.class_embedding.expand(len(x), 1, -1)
        x = v.ln_pre(torch.cat([token, x], 1) + v.positional_embedding)
        for layer in v.transformer.resblocks:
            x = layer(x)
        image_embedding = v.ln_post(x[:, 0]) @ v.proj
        n = ids.shape[1]
        mask = torch.full((n, n), -torch.inf, dtype=image.dtype).triu(1)
        x = self.token_embedding(ids) + self.positional_embedding[:n]
        for layer in self.transformer.resblocks:
            x = layer(x, mask)
        x = self.ln_final(x)[torch.arange(len(ids)), ids.argmax(1)]
        return image_embedding, x @ self.text_projection


def open_ai(image, ids):
    model = OpenAI().eval()
    manifest = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    model.load_state_dict(fill(manifest), strict=True)
    with torch.no_grad():
        image_embedding, text_embedding = model.double()(image, ids)
    return manifest, {"image_embedding": image_embedding, "text_embedding": text_embedding}


def towers():
    image = seeded.normal("image", (2, 24, 24, 3)).astype(np.float32)
    image = torch.from_numpy(image).double().permute(0, 3, 1, 2)
    arrays = {"ids": np.array(IDS, np.int32)}
    for name, run in (("hugging_face", hugging_face), ("open_ai", open_ai)):
        manifest, outputs = run(image, torch.tensor(IDS))
        arrays[f"{name}/manifest"] = json.dumps(manifest)
        for key, value in outputs.items():
            arrays[f"{name}/{key}"] = value.float().numpy()
    return arrays


def preprocessing():
    processor = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=24)
    noise = np.random.RandomState(0)
    arrays = {}
    for name, shape in (("down", (31, 50, 3)), ("up", (17, 12, 3))):
        image = noise.randint(0, 256, shape).astype(np.uint8)
        arrays[f"{name}/image"] = image
        pixels = processor(image, return_tensors="np")["pixel_values"]
        arrays[f"{name}/pixels"] = pixels[0].transpose(1, 2, 0)
    return arrays


def train_merges(captions, count):
    """Byte-pair merges of the captions' words, the most frequent pair first."""
    letters = byte_letters()
    words = collections.Counter(w for c in captions for w in c.lower().split() if "<|" not in w)
    split = {w: [letters[b] for b in w.encode()] for w in words}
    for symbols in split.values():
        symbols[-1] += "</w>"
    merges = []
    for _ in range(count):
        pairs = collections.Counter()
        for word, symbols in split.items():
            for pair in zip(symbols, symbols[1:]):
                pairs[pair] += words[word]
        best = max(sorted(pairs), key=pairs.get)
        merges.append(best)
        for word, symbols in split.items():
            text = "\0".join(symbols) + "\0"
            split[word] = text.replace("\0".join(best) + "\0", "".join(best) + "\0")[:-1].split(
                "\0"
            )
    return merges


def byte_letters():
    plain = [b for b in range(256) if chr(b).isprintable() and b not in (32, 160, 173)]
    letters = {b: chr(b) for b in plain}
    for b in range(256):
        letters.setdefault(b, chr(256 + len(letters) - len(plain)))
    return letters


def tokenizer():
    merges = train_merges(CAPTIONS[:3] + CAPTIONS[4:6], 60)
    letters = list(byte_letters().values())
    symbols = [*letters, *(c + "</w>" for c in letters), *("".join(m) for m in merges)]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    reference = CLIPTokenizer(vocab=vocab, merges=list(merges))
    rows = reference(CAPTIONS, padding="max_length", truncation=True, max_length=77)["input_ids"]
    end = vocab["<|endoftext|>"]
    ids = []
    for row in rows:
        # Without the padding, which is the id that ends the text.
        while len(row) > 1 and row[-1] == row[-2] == end:
            row = row[:-1]
        ids.append(row)
    return {"vocab": vocab, "merges": [" ".join(m) for m in merges], "texts": CAPTIONS, "ids": ids}


if __name__ == "__main__":
    np.savez_compressed(HERE / "clip.npz", **towers(), **preprocessing())
    (HERE / "clip_tokenizer.json").write_text(json.dumps(tokenizer(), ensure_ascii=True) + "\n")
