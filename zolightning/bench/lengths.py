"""Prompts without text: their lengths are those of real tasks, their tokens are random."""

import numpy as np

from zolightning.data.encoding import Example

# A histogram of equally likely lengths, the middles of hundredths: tokens of the prompts of this package's tasks for
# 1,000 training rows each, by SmolLM2's tokenizer. Their answers have one token.
_TEXT = {
    "sst2": """
        3 4 4 4 4 4 5 5 5 5 5 5 5 5 5 5 5 6 6 6
        6 6 6 6 6 6 6 7 7 7 7 7 7 7 7 8 8 8 8 8
        8 9 9 9 9 9 10 10 10 10 10 10 10 11 11 11 11 12 12 12
        12 12 13 13 13 14 14 14 15 15 15 16 16 16 17 17 18 18 18 19
        19 20 21 21 22 23 23 24 25 26 27 28 29 30 32 33 35 38 42 49
    """,
    "rte": """
        31 34 37 40 40 42 43 44 45 46 47 48 48 49 50 51 52 52 53 54
        54 55 55 56 56 57 57 58 58 59 60 60 61 61 62 63 63 63 64 65
        65 66 67 67 68 68 69 69 70 71 71 72 73 74 74 75 76 76 77 78
        78 79 80 80 81 82 83 84 86 87 89 92 93 95 96 99 102 108 111 115
        120 124 128 132 135 139 142 145 149 153 155 158 163 169 174 179 187 204 216 245
    """,
    "boolq": """
        39 44 51 55 59 62 64 66 68 70 73 76 78 79 81 82 84 87 88 90
        92 94 96 97 99 100 102 103 104 106 107 108 109 110 112 113 114 115 116 117
        119 119 121 122 123 125 126 128 129 130 133 134 136 138 139 140 142 144 146 147
        149 151 152 155 157 160 163 164 166 167 169 170 172 175 177 180 183 186 188 190
        194 198 201 203 210 213 218 226 231 235 240 249 257 266 272 288 307 326 369 503
    """,
}
LENGTHS = {task: tuple(map(int, text.split())) for task, text in _TEXT.items()}


def draw_prompts(lengths: str, count: int, vocabulary: int) -> list[Example]:
    """Examples with two answers of one token each.

    Args:
        lengths: a task of :data:`LENGTHS`, or the tokens of every prompt.
        count: examples.
        vocabulary: tokens are drawn from those below.
    """
    random = np.random.RandomState(0)
    tokens = random.choice(LENGTHS[lengths], count) if lengths in LENGTHS else [int(lengths)] * count
    return [
        Example(id, random.randint(vocabulary, size=length).tolist(), [[1], [2]], label=id % 2, text="")
        for id, length in enumerate(tokens)
    ]
