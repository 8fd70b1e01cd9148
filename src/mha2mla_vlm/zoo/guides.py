"""What guides training: where on its page each image token lies, and which tokens show an answer."""

import torch

from mha2mla_vlm.zoo.architectures import PATCH, TILE
from mha2mla_vlm.zoo.chats import Chat, Page

COARSE_TOKENS = {"llava_next": (TILE // PATCH) ** 2}  # a page's first, which show it whole


def token_points(name: str, page: Page) -> list[tuple[float, float] | None]:
    """Centre (y, x in pixels) of the patch of the page behind each image token; None for separators."""
    width, height = page.image.size
    rows, columns, side = height // PATCH, width // PATCH, TILE // PATCH
    points: list[tuple[float, float] | None] = [
        ((i + 0.5) * PATCH, (j + 0.5) * PATCH) for i in range(rows) for j in range(columns)
    ]
    if name not in COARSE_TOKENS:
        return points
    whole: list[tuple[float, float] | None] = [
        ((i + 0.5) * height / side, (j + 0.5) * width / side) for i in range(side) for j in range(side)
    ]
    for row in range(rows):
        whole += [*points[row * columns : (row + 1) * columns], None]
    return whole


def own_tokens(name: str, page: Page) -> list[int]:
    """Which of a page's image tokens are patches of their own, neither coarse nor separators; row by row."""
    first = COARSE_TOKENS.get(name, 0)
    return [i for i, point in enumerate(token_points(name, page)) if i >= first and point is not None]


def token_targets(name: str, chats: list[Chat]) -> torch.Tensor:
    """Digit, row and column under each image token of chats, in order: `[tokens, 3]`, -1 for none."""
    targets = []
    for page in (page for chat in chats for page in chat.pages):
        for point in token_points(name, page):
            targets.append((page.digit_at(*point) if point else None) or (-1, -1, -1))
    return torch.tensor(targets)


def answer_sources(
    name: str, chats: list[Chat], is_image: torch.Tensor, labels: torch.Tensor, digits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where each digit of the answers is predicted, and which tokens of the prompt show it.

    `is_image` and `labels` are `[B, T]`, `digits` the ids of the ten digits. Returns rows and
    positions `[n]`, and a mask `[n, T]`; digits that no cell shows (a count of none) are left out.
    """
    rows, positions, masks = [], [], []
    for row, chat in enumerate(chats):
        places = is_image[row].nonzero()[:, 0].tolist()
        tokens: dict[tuple[int, int, int], list[int]] = {}
        for number, page in enumerate(chat.pages):
            points = token_points(name, page)
            mine, places = places[: len(points)], places[len(points) :]
            for token in own_tokens(name, page):
                place, point = mine[token], points[token]
                found = page.digit_at(*point) if point else None
                if found:
                    tokens.setdefault((number, *found[1:]), []).append(place)
        places = torch.isin(labels[row, 1:].cpu(), digits).nonzero()[:, 0].tolist()
        for position, (number, cells) in zip(places, chat.sources, strict=True):
            if cells:
                mask = torch.zeros(labels.shape[1])
                mask[[place for cell in cells for place in tokens[number, *cell]]] = 1
                rows.append(row)
                positions.append(position)
                masks.append(mask)
    return torch.tensor(rows), torch.tensor(positions), torch.stack(masks)
