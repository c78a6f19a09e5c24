"""The models of `models.py` in PyTorch, with attention spelled out as there."""

from typing import Any

import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]


class Block(nn.Module):
  """As `benchmarks.models.Block`."""

  def __init__(self, width: int, heads: int, causal: bool = True) -> None:
    super().__init__()
    self.heads, self.causal = heads, causal
    self.first, self.second = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
    self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
    self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

  def attend(self, x: Any) -> Any:
    """Multi-head attention by two matmuls and a softmax."""
    batch, length, width = x.shape
    parts = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
    query, key, value = parts.permute(2, 0, 3, 1, 4)
    scores = query @ key.transpose(-1, -2) * (width // self.heads) ** -0.5
    if self.causal:
      mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
      scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    mixed = scores.softmax(-1) @ value
    return self.out(mixed.transpose(1, 2).reshape(batch, length, width))

  def forward(self, x: Any) -> Any:
    """Adds attention, then a perceptron four times as wide, to the stream."""
    x = x + self.attend(self.first(x))
    hidden = nn.functional.gelu(self.up(self.second(x)), approximate="tanh")
    return x + self.down(hidden)


class Transformer(nn.Module):
  """As `benchmarks.models.Transformer`."""

  def __init__(
    self,
    length: int,
    layers: int = 12,
    width: int = 768,
    heads: int = 12,
    vocabulary: int = 50257,
  ) -> None:
    super().__init__()
    self.embed, self.place = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
    nn.init.normal_(self.embed.weight, std=width**-0.5)
    nn.init.normal_(self.place.weight, std=width**-0.5)
    self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
    self.norm = nn.LayerNorm(width, eps=1e-6)

  def forward(self, tokens: Any) -> Any:
    """Maps tokens to the logits of each next token."""
    x = self.embed(tokens) + self.place.weight
    return nn.functional.linear(self.norm(self.blocks(x)), self.embed.weight)


class VisionTransformer(nn.Module):
  """As `benchmarks.models.VisionTransformer`."""

  def __init__(
    self,
    side: int,
    layers: int = 12,
    width: int = 768,
    heads: int = 12,
    patch: int = 16,
    classes: int = 1000,
  ) -> None:
    super().__init__()
    self.patches = nn.Conv2d(3, width, patch, patch)
    self.token = nn.Parameter(torch.zeros(1, 1, width))
    self.place = nn.Parameter(torch.randn(1, (side // patch) ** 2 + 1, width) * 0.02)
    self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(layers)))
    self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, classes)

  def forward(self, images: Any) -> Any:
    """Maps pictures [batch, 3, height, width] to the logits of their classes."""
    x = self.patches(images).flatten(2).transpose(1, 2)
    x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.place
    return self.head(self.norm(self.blocks(x))[:, 0])


def _normed(inputs: int, outputs: int, side: int, stride: int) -> nn.Sequential:
  conv = nn.Conv2d(inputs, outputs, side, stride, side // 2, bias=False)
  return nn.Sequential(conv, nn.BatchNorm2d(outputs, momentum=0.01))


class Bottleneck(nn.Module):
  """As `benchmarks.models.Bottleneck`."""

  def __init__(self, inputs: int, features: int, stride: int) -> None:
    super().__init__()
    self.body = nn.Sequential(
      _normed(inputs, features, 1, 1),
      nn.ReLU(),
      _normed(features, features, 3, stride),
      nn.ReLU(),
      _normed(features, 4 * features, 1, 1),
    )
    same = inputs == 4 * features and stride == 1
    self.shortcut = nn.Identity() if same else _normed(inputs, 4 * features, 1, stride)

  def forward(self, x: Any) -> Any:
    """Adds the three convolutions to the (projected) input."""
    return torch.relu(self.shortcut(x) + self.body(x))


class ResNet(nn.Module):
  """As `benchmarks.models.ResNet`."""

  def __init__(
    self, stages: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, classes: int = 1000
  ) -> None:
    super().__init__()
    blocks, channels = [], width
    for stage, count in enumerate(stages):
      for block in range(count):
        features = width * 2**stage
        stride = 2 if stage > 0 and block == 0 else 1
        blocks.append(Bottleneck(channels, features, stride))
        channels = 4 * features
    self.stem = nn.Sequential(_normed(3, width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(channels, classes)

  def forward(self, images: Any) -> Any:
    """Maps pictures [batch, 3, height, width] to the logits of their classes."""
    return self.head(self.blocks(self.stem(images)).mean((2, 3)))


class RecurrentModel(nn.Module):
  """As `benchmarks.models.RecurrentModel`."""

  def __init__(self, layers: int = 2, width: int = 1024, vocabulary: int = 10000) -> None:
    super().__init__()
    self.embed = nn.Embedding(vocabulary, width)
    self.cells = nn.LSTM(width, width, layers, batch_first=True)
    self.head = nn.Linear(width, vocabulary)

  def forward(self, tokens: Any) -> Any:
    """Maps tokens to the logits of each next token."""
    return self.head(self.cells(self.embed(tokens))[0])
