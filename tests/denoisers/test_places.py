"""Where tokens stand in a denoiser's text: rows of what encoders gave, found again whatever pipelines do with them."""

import torch

from goca_guidance.denoisers.places import CHANNELS, OFTEN, Read, Run, placed, read_of


WIDTH = 12


def read(*texts, layers=3, seed=0):
    """What an encoder gave for texts that are causal: rows depend on all tokens before."""
    ids = torch.tensor(texts)
    rows = torch.empty(layers, *ids.shape, WIDTH)
    for b, text in enumerate(texts):
        for n in range(len(text)):
            generator = torch.Generator().manual_seed(hash((seed, *text[: n + 1])) % 2**31)
            rows[:, b, n] = torch.randn(layers, WIDTH, generator=generator)
    output = {"last_hidden_state": rows[-1], "hidden_states": tuple(rows)}
    return read_of((), {"input_ids": ids}, output), rows


def runs(reads, *texts):
    return [[(run.source, run.first, run.place, run.length) for run in of_image] for of_image in placed(reads, texts)]


def test_what_is_kept_of_a_call():
    """Few channels of each layer, on the encoder's device, whichever axis comes first; ids by name or position."""
    ids, mask = torch.tensor([[5, 6, 7]]), torch.tensor([[0, 1, 1]])
    rows = torch.randn(1, 3, WIDTH)
    kept = read_of((ids,), {"attention_mask": mask}, (rows, {"more": [rows.transpose(0, 1)]}, rows.mean(1), ids))
    assert [layer.shape for layer in kept.layers] == [(1, 3, CHANNELS)] * 2
    assert all(torch.equal(layer, rows[..., :CHANNELS]) for layer in kept.layers)
    assert all(layer.untyped_storage().nbytes() == 3 * CHANNELS * 4 for layer in kept.layers)
    assert kept.rows() == [[-1, 6, 7]]
    assert read_of((), {"inputs_embeds": rows}, (rows,)) is None


def test_a_template_is_dropped_and_padding_is_cut():
    positive, rows = read([1, 2, 3, 10, 11, 4])
    negative, _ = read([1, 2, 3, 4, 0, 0])
    expected = [((0, 0, 0), 3, 0, 3)]
    for layer in range(3):
        assert runs([[positive, negative]], [rows[layer, 0, 3:]]) == [expected]
        assert runs([[negative, positive]], [rows[layer, 0, 3:]]) == [[((0, 1, 0), 3, 0, 3)]]


def test_the_longest_run_is_taken():
    """A template is alike in both texts; what the first row alone cannot tell, the ones behind do."""
    positive, rows = read([1, 2, 3, 10, 11, 4])
    negative, other = read([1, 2, 3, 20, 4, 4])
    texts = torch.stack([rows[-1, 0], other[-1, 0]])
    assert runs([[negative, positive]], texts) == [[((0, 1, 0), 0, 0, 6)], [((0, 0, 0), 0, 0, 6)]]


def test_the_first_and_the_last_tokens():
    """Sana's, and what is left of a text that others stand in."""
    positive, rows = read([1, 2, 3, 10, 11, 4])
    negative, _ = read([1, 4, 0, 0, 0, 0])
    kept = torch.cat([rows[-1, 0, :1], torch.zeros(2, WIDTH), rows[-1, 0, 4:]])
    assert runs([[negative, positive]], [kept]) == [[((0, 1, 0), 0, 0, 1), ((0, 1, 0), 4, 3, 2)]]


def test_several_texts_behind_one_another():
    """Of two encoders in two parts of other widths and lengths, of which the longest says where the next one begins."""
    first, rows = read([1, 10, 11, 4], [1, 12, 4, 0])
    second, others = read([5, 10, 11], [5, 12, 0], seed=1)
    texts = [rows[-1, :, 1:], others[0, :, :, :9]]
    assert runs([[first], [second]], *texts) == [[((0, 0, b), 1, 0, 3), ((1, 0, b), 0, 3, 3)] for b in range(2)]
    uneven = [[rows[-1, 0, 1:3], rows[-1, 1, 1:]], others[0]]
    assert runs([[first], [second]], *uneven) == [
        [((0, 0, 0), 1, 0, 2), ((1, 0, 0), 0, 3, 3)],
        [((0, 0, 1), 1, 0, 3), ((1, 0, 1), 0, 3, 3)],
    ]


def test_chunks_stand_side_by_side():
    """With the same start in each."""
    first, rows = read([1, 10, 11, 4])
    second, others = read([1, 12, 4, 4])
    assert runs([[second, first]], [torch.cat([rows[-1, 0], others[-1, 0]])]) == [
        [((0, 1, 0), 0, 0, 4), ((0, 0, 0), 0, 4, 4)]
    ]


def test_stacked_layers_and_other_dtypes():
    """Flux.2 stacks layers in channels, Krea 2 along an axis; a text is rounded to the denoiser's dtype."""
    given, rows = read([1, 2, 10, 11])
    expected = [[((0, 0, 0), 1, 0, 3)]]
    assert runs([[given]], [torch.cat([rows[1, 0], rows[2, 0]], -1)[1:]]) == expected
    assert runs([[given]], [torch.stack([rows[0, 0], rows[2, 0]], 1)[1:]]) == expected
    assert runs([[given]], [rows[1, 0, 1:].bfloat16()]) == expected


def test_rows_that_are_nobodys():
    """Zeros stand for padding, also where an encoder gives zeros; so does what a text has again and again."""
    given, rows = read([1, 10])
    zeros = Read(given.ids, tuple(torch.zeros_like(layer) for layer in given.layers))
    assert runs([[zeros]], [-torch.zeros(2, WIDTH)]) == [[]]
    assert runs([[given]], [rows[-1, 0] * 2]) == [[]]
    padding = rows[-1].expand(1, -1, -1).repeat(1, OFTEN + 1, 1)
    many = Read(torch.ones(1, padding.shape[1], dtype=torch.long), (padding[..., :CHANNELS],))
    assert runs([[many]], [padding[0]]) == [[]]
    assert placed([[]], [[rows[0, 0]]]) == [[]]
    assert placed([[given]], []) == []


def test_parts_of_one_encoder():
    """HiDream gets two layers of the same text."""
    given, rows = read([1, 10])
    assert [(run.part, run.place) for run in placed([[given]], [rows[1], rows[0]])[0]] == [(0, 0), (1, 2)]
    assert placed([[given]], [rows[1]]) == [[Run(0, (0, 0, 0), 0, 0, 2)]]
