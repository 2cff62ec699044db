"""Captions to generate for: COCO's CSV file as a CSV file, and what is wrong with one."""

import csv

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.generation.captions import captions_of, coco_captions, digest_of, scenes_captions
from eval.scenes.scene import scene
from tests.helpers.places import shared


def written(path, text):
    path.write_bytes(text.encode())
    return path


def test_the_30_000_captions():
    path = shared("coco30k/MS-COCO_val2014_30k_captions.csv")
    found = coco_captions(path)
    table = pd.read_csv(path, dtype=str, keep_default_na=False).set_index("image_id")["text"]
    assert len(found) == len(table) == 30_000
    assert len(path.read_text().splitlines()) > 30_000
    assert found == table.to_dict()
    assert list(found) == sorted(found, key=int)
    assert len(set(found.values())) == 29_462


AWKWARD = ('a "cat", a dog', "one\ntwo\r\n", "🐈‍⬛ ☕", "", "NA")
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)


@settings(deadline=None)
@given(st.dictionaries(st.integers(0, 10**9), TEXT | st.sampled_from(AWKWARD), min_size=1))
def test_what_pandas_writes_is_read(tmp_path_factory, captions):
    path = tmp_path_factory.mktemp("captions") / "captions.csv"
    pd.DataFrame({"image_id": captions.keys(), "text": captions.values()}).to_csv(
        path, index=False, quoting=csv.QUOTE_ALL
    )
    assert coco_captions(path) == {str(name): captions[name] for name in sorted(captions)}


def test_commas_quotes_newlines_and_a_byte_order_mark(tmp_path):
    text = '\ufeffimage_id,text,note\r\n10,"A ""big"" cat,\nasleep",x\r\n9, A dog. ,\r\n\r\n0011,"",y\r\n'
    found = coco_captions(written(tmp_path / "captions.csv", text))
    assert list(found.items()) == [("9", " A dog. "), ("10", 'A "big" cat,\nasleep'), ("11", "")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"columns image_id, text .* image_id, text is not among \[\]"),
        ("image_id,text\n", "at least one caption"),
        ("id,text\n1,a\n", r"image_id is not among \['id', 'text'\]"),
        ("image_id,text\n1,a\n2,b\n01,c\n2,d\n", r"one row for each image_id .* 1 \(2 times\), 2 \(2 times\)"),
        ("image_id,text\n1,a\n1.5,b\n-3,c\n,d\n", r"whole numbers for image_id .* '1.5', '-3', ''\."),
        ("image_id,text\n" + "x,a\n" * 8, r"'x', 'x', 'x', 'x', 'x' and 3 more"),
        ("image_id,text\n1,a cat, a dog\n2\n", "fields as the header .* line 2, line 3"),
        ('image_id,text\n1,a\n2,"a cat\n3,b\n', "broken after line 2"),
        ('image_id,text\n1,"a" cat\n', "broken after line 1"),
    ],
)
def test_mistakes_in_the_file(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        coco_captions(written(tmp_path / "captions.csv", text))


def test_what_is_no_text(tmp_path):
    (tmp_path / "captions.csv").write_bytes(b"image_id,text\n1,caf\xe9\n")
    with pytest.raises(ValueError, match="a CSV file in UTF-8"):
        coco_captions(tmp_path / "captions.csv")
    with pytest.raises(ValueError, match=r'"scenes" or a CSV file .* no file'):
        captions_of(str(tmp_path / "none.csv"), "test", 1)


def test_captions_of_scenes():
    found = scenes_captions("test", 3)
    assert found == {f"{i:06d}": scene("test", i).caption for i in range(3)} == captions_of("scenes", "test", 3)
    assert scenes_captions("validation", 3) != found
    with pytest.raises(ValueError, match="a split among"):
        scenes_captions("tset", 1)


def test_the_digest_sees_every_change():
    captions = {"1": "a cat", "2": "a dog"}
    others = [{"1": "a cat"}, {"1": "a cat", "3": "a dog"}, {"1": "a cat", "2": "a Dog"}, {"1a": " cat", "2": "a dog"}]
    assert len({digest_of(each) for each in (captions, *others)}) == 5
    assert digest_of(captions) == digest_of(dict(captions))
