"""Prompts: which phrases a caption has, which class each names, and that every source's prompts can be read by a pipeline."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.datasets.ade20k import ADE20K
from eval.datasets.cityscapes import CITYSCAPES
from eval.datasets.coco import COCO_OBJECT, STUFF_27, STUFF_171
from eval.datasets.pascal import CONTEXT, VOC
from eval.prompts.phrases import aliases_of, caption_groups, clean, forms, name_index, named
from eval.prompts.prompt_file import Written, write_prompts
from eval.prompts.sources import Captions, Entity, Prompt, Tags, Vocabulary, release
from eval.scenes.scene import CLASSES as SCENES
from eval.scenes.tokenizers import clip_tokenizer
from goca_guidance.denoisers.words import words
from tests.helpers.places import shared


CLASSES = (
    "background",
    "person",
    "dog",
    "car",
    "bus",
    "dining table",
    "potted plant",
    "tree",
    "traffic light",
    "light",
)
WORDS = aliases_of("voc", CLASSES)
INDEX = name_index(CLASSES, WORDS)
ALL = {
    "voc": VOC, "context": CONTEXT, "coco-object": COCO_OBJECT, "coco-stuff-27": STUFF_27, "coco-stuff-171": STUFF_171,
    "cityscapes": CITYSCAPES, "ade20k": ADE20K, "scenes": SCENES,
}  # fmt: skip


def captions(tmp_path, texts, **settings):
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({f"{name}.jpg": {"caption": text} for name, text in texts.items()}))
    return Captions(path, CLASSES, WORDS, **settings)


def prompt(tmp_path, text, *present, **settings):
    """(text, [(words, name of the class or None)]) of one caption."""
    [found] = captions(tmp_path, {"a": text}, **settings)("a", None, tuple(map(CLASSES.index, present)))
    return found.text, [(e.words, e.label if e.label is None else CLASSES[e.label]) for e in found.entities]


# ---- phrases and classes ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("caption", "groups"),
    [
        ("Dog, (person, clothes), sky.", [("dog",), ("person", "clothes"), ("sky",)]),
        ("(zebra) foal, grass", [("zebra", "foal"), ("grass",)]),
        ("car (bonnet), road", [("car", "bonnet"), ("road",)]),
        ("(cow) (cow) hill, mud", [("cow",), ("cow", "hill"), ("mud",)]),
        ("(shop, (person, hat), shelf), floor", [("person", "hat"), ("shop", "shelf"), ("floor",)]),
        ("((person, hat), kite)", [("person", "hat"), ("kite",)]),
        ("(animal", [("animal",)]),
        ("dog), cat", [("dog",), ("cat",)]),
        ("(background: tree, wall), (person, boots) in the foreground", [("tree", "wall"), ("person", "boots")]),
        ("Left: (van, door).\nRight: (man, cap)", [("van", "door"), ("man", "cap")]),
        ("(person, coat) x3, umbrella x 2, 4 people", [("person", "coat"), ("umbrella",), ("people",)]),
        ("I cannot tell what that is.\n\n(person, coat)", [("person", "coat")]),
        ("'(sofa, sofa), person’s hand, cr\u00e8me, pine\u00adapple, T-Shirt.'",
         [("sofa",), ("person's hand",), ("crème",), ("pineapple",), ("t-shirt",)]),
        ("a dog, the cat, on a plate, , ()", [("dog",), ("cat",), ("plate",)]),
        ("", []),
    ],
)  # fmt: skip
def test_groups_of_a_caption(caption, groups):
    assert caption_groups(caption) == groups


@pytest.mark.parametrize(
    ("phrase", "name"),
    [
        ("dogs", "dog"), ("Buses", "bus"), ("bus", "bus"), ("people", "person"), ("old woman", "person"), ("car", "car"),
        ("dining tables", "dining table"), ("table", "dining table"), ("houseplants", "potted plant"), ("taxi", "car"),
        ("traffic lights", "traffic light"), ("ceiling lights", "light"), ("flashlight", None), ("carpet", None),
        ("scar", None), ("car seat", None), ("bus stop", None), ("doge", None), ("background", None), ("", None),
    ],
)  # fmt: skip
def test_class_of_a_phrase(phrase, name):
    assert named(phrase, INDEX) == (None if name is None else CLASSES.index(name))


@pytest.mark.parametrize(
    ("plural", "singular"),
    [("horses", "horse"), ("benches", "bench"), ("boxes", "box"), ("ponies", "pony"), ("shelves", "shelf"),
     ("knives", "knife"), ("potatoes", "potato"), ("glasses", "glass"), ("trees", "tree")],
)  # fmt: skip
def test_plural(plural, singular):
    assert singular in forms(plural)
    assert forms(singular) == [singular]


def test_no_singular_of_another_word():
    assert not {"cloth", "bu", "gras", "tenni"} & {f for w in ("clothes", "bus", "grass", "tennis") for f in forms(w)}


def test_exact_name_comes_before_singular_and_alias():
    index = name_index(("glass", "glasses", "cup"), {"mug": "cup", "mugs": "glass"})
    assert [named(p, index) for p in ("glass", "glasses", "wine glass", "mug", "mugs")] == [0, 1, 0, 2, 0]


@pytest.mark.parametrize("name", ALL)
def test_own_words_never_take_a_class_from_its_name(name):
    """Every class is named by its name; every word of ours names the class that it is given for."""
    classes, ours = ALL[name], aliases_of(name, ALL[name])
    index = name_index(classes, ours)
    for label, class_name in enumerate(classes):
        assert named(class_name, index) == (None if class_name == "background" else label)
    assert {phrase: classes[named(phrase, index)] for phrase in ours} == ours
    assert not set(ours) & set(classes)


def test_own_words_by_benchmark():
    def means(name, phrase):
        label = named(phrase, name_index(ALL[name], aliases_of(name, ALL[name])))
        return None if label is None else ALL[name][label]

    assert means("voc", "airplane") == "aeroplane"
    assert means("coco-object", "aeroplane") == "airplane"
    assert [means(n, "sofas") for n in ("voc", "coco-object", "ade20k")] == ["sofa", "couch", "sofa"]
    assert [means(n, "cyclist") for n in ("voc", "cityscapes")] == ["person", "rider"]
    assert [means(n, "palm tree") for n in ("context", "cityscapes", "ade20k")] == ["tree", "vegetation", "palm"]
    assert [means(n, "television screen") for n in ("voc", "ade20k")] == ["tv monitor", "screen"]
    assert [means(n, "horse") for n in ("context", "coco-stuff-27")] == ["horse", "animal"]
    assert means("context", "shelf") == "shelves"
    assert means("coco-stuff-171", "cloud") == "clouds"


def test_bad_names():
    with pytest.raises(ValueError, match=r"\['Dog', 'dog'\]"):
        Tags(("dog", "Dog"))
    with pytest.raises(ValueError, match="cow"):
        name_index(CLASSES, {"calf": "cow"})


# ---- captions to prompts ---------------------------------------------------------------------------------------------
def test_absent_classes_are_background(tmp_path):
    text, entities = prompt(tmp_path, "Dogs, (person, clothes), car, sky.", "dog", "person")
    assert text == "dogs, person, clothes, car, sky"
    assert entities == [("dogs", "dog"), ("person, clothes", "person"), ("car", None), ("sky", None)]


def test_group_of_several_present_classes_is_split(tmp_path):
    text, entities = prompt(tmp_path, "(street, man, hat, dog, car, leash)", "dog", "person")
    assert entities == [("street", None), ("man, hat", "person"), ("dog, car, leash", "dog")]
    assert text == "street, man, hat, dog, car, leash"


def test_repeated_phrases_are_one(tmp_path):
    caption = "(person, clothes), sky, (person, clothes, hat), (dog, clothes), sky, (shop, person)"
    text, entities = prompt(tmp_path, caption, "dog", "person")
    assert text == "person, clothes, hat, shop, sky, dog"
    assert entities == [("person, clothes, hat, shop", "person"), ("sky", None), ("dog", "dog")]


def test_part_of_a_class_does_not_draw_background_to_it(tmp_path):
    text, entities = prompt(tmp_path, "(room, dog), (room, wall), (wall, shelf)", "dog")
    assert entities == [("dog, room", "dog"), ("wall, shelf", None)]
    assert text == "dog, room, wall, shelf"


def test_present_classes_are_appended_then_background_words(tmp_path):
    settings = {"background": ("background", "sky")}
    _, entities = prompt(tmp_path, "sky, man.", "person", "potted plant", **settings)
    assert entities == [("sky", None), ("man", "person"), ("potted plant", "potted plant"), ("background", None)]
    _, entities = prompt(tmp_path, "sky, man.", "person", "potted plant", append_missing=False, **settings)
    assert entities == [("sky", None), ("man", "person"), ("background", None)]


def test_labels_of_the_caption(tmp_path):
    """Predicted tags: the ground truth is not read."""
    _, entities = prompt(tmp_path, "(bus, wheel), sky, people", "dog", labels="caption")
    assert entities == [("bus, wheel", "bus"), ("sky", None), ("people", "person")]


def test_nothing_to_ask_for(tmp_path):
    assert captions(tmp_path, {"a": "."})("a", None, ()) == []
    assert Tags(CLASSES)("a", None, ()) == []


def test_release():
    assert release("voc") == {"append_missing": True, "background": ("background",)}
    assert release("coco-object") == {"append_missing": False, "background": ("background",)}
    assert release("cityscapes") == {"append_missing": False, "background": ()}


def test_names_of_images(tmp_path):
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"ulm_1_leftImg8bit.png": {"caption": "car"}, "2.jpg": {"caption": "dog"}}))
    source = Captions(path, CLASSES)
    source.check(["ulm/ulm_1", "2"])
    assert source("ulm/ulm_1", None, (3,)) == [Prompt("car", (Entity("car", 3),))]


# ---- bad captions ----------------------------------------------------------------------------------------------------
def test_missing_entries_are_listed(tmp_path):
    source = captions(tmp_path, {"a": "dog"})
    with pytest.raises(ValueError, match=r"7 of 8 have none: 0, 1, 2, 3, 4, \.\.\."):
        source.check(["a", *"0123456"])
    with pytest.raises(ValueError, match="1 of 1 have none: b"):
        source("b", None, ())


def test_captions_of_another_benchmark(tmp_path):
    """Only the entries of the samples in question count."""
    source = captions(tmp_path, {"a": "sofa, lamp", "b": "dog"})
    source.check(["a", "b"])
    with pytest.raises(ValueError, match=r"none of the 1 entries .* does"):
        source.check(["a"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a.jpg": {"caption": "dog"}', "well-formed JSON"),
        ('{"a.jpg": {"caption": "dog"}, "a.jpg": {"caption": "cat"}}', r"'a.jpg'\] stand there twice"),
        ('{"a.jpg": {"caption": "dog"}, "a.png": {"caption": "cat"}}', "two for 'a'"),
        ('{"a.jpg": "dog"}', "another shape"),
        ('{"a.jpg": {"caption": null}}', "another shape"),
        ("[]", "another shape"),
        ("\udcff", "well-formed JSON"),
    ],
)
def test_bad_caption_file(tmp_path, text, message):
    path = tmp_path / "captions.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message):
        Captions(path, CLASSES)


def test_bad_settings(tmp_path):
    with pytest.raises(ValueError, match="labels"):
        captions(tmp_path, {}, labels="ground truth")
    with pytest.raises(ValueError, match=r"from 0 to 9, but got \[-1, 10\]"):
        Tags(CLASSES)("a", None, (1, 10, -1))
    with pytest.raises(ValueError, match="chunk"):
        Vocabulary(CLASSES, chunk=0)


# ---- other sources ---------------------------------------------------------------------------------------------------
def test_tags():
    assert Tags(CLASSES)("a", None, (0, 5, 2)) == [
        Prompt("dog, dining table", (Entity("dog", 2), Entity("dining table", 5)))
    ]


@pytest.mark.parametrize(("chunk", "sizes"), [(4, [3, 3, 3]), (9, [9]), (100, [9]), (8, [5, 4]), (1, [1] * 9)])
def test_vocabulary_names_every_class_once(chunk, sizes):
    prompts = Vocabulary(CLASSES, chunk)("a", None, (2,))
    assert [len(p.entities) for p in prompts] == sizes
    assert [e.label for p in prompts for e in p.entities] == list(range(1, 10))
    assert ", ".join(p.text for p in prompts) == ", ".join(CLASSES[1:])


# ---- written out -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "JSON in line 1"),
        ('{"id": "a"}', "KeyError"),
        ("[1]", "TypeError"),
        ('{"id": "a", "prompts": [{"text": "cat", "entities": [{"words": "dog", "class": "dog"}]}]}', "lacks"),
        ('{"id": "a", "prompts": [{"text": "dog", "entities": [{"words": "dog", "class": "cow?"}]}]}', "class 'cow"),
        ('{"id": "a", "prompts": []}\n{"id": "a", "prompts": []}', "two for 'a'"),
    ],
)
def test_bad_prompt_file(tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match=message):
        Written(path, CLASSES)


def test_written_prompts_lack_an_image(tmp_path):
    write_prompts(tmp_path / "p.jsonl", {"a": []}, CLASSES)
    with pytest.raises(ValueError, match="1 of 2 have none: b"):
        Written(tmp_path / "p.jsonl", CLASSES).check(["a", "b"])


@pytest.mark.parametrize("text", ["hotdog", "dog", "", "dogs and cat"])
def test_prompt_holds_whole_phrases(text):
    with pytest.raises(ValueError, match="lacks"):
        Prompt(text, (Entity("dog, cat", 1),))


def test_entities_of_equal_words():
    with pytest.raises(ValueError, match=r"\['dog'\] stand twice"):
        Prompt("dog", (Entity("dog", 1), Entity("dog", None)))


# ---- properties ------------------------------------------------------------------------------------------------------
NOUNS = st.one_of(
    st.sampled_from([*CLASSES, *WORDS, "clothes", "sky", "Dogs", "the car", "person’s hat", "x2", "left:"]),
    st.text(max_size=12),
)
CAPTIONS = st.lists(
    st.one_of(NOUNS, st.lists(NOUNS, max_size=4).map(lambda parts: f"({', '.join(parts)})"), st.sampled_from("(),")),
    max_size=10,
).map(", ".join)


class Given(Captions):
    """Captions without a file."""

    def __init__(self, text, **settings):
        super(Captions, self).__init__(CLASSES, WORDS, **settings)
        self.text = text

    def caption(self, sample_id, image):
        return self.text


@given(CAPTIONS, st.sets(st.integers(1, len(CLASSES) - 1)), st.booleans(), st.sampled_from(["tags", "caption"]))
def test_any_caption_makes_a_sound_prompt(caption, present, append, labels):
    prompts = Given(caption, append_missing=append, labels=labels, background=("background",))(
        "a", None, tuple(present)
    )
    [made] = prompts
    phrases = [phrase for entity in made.entities for phrase in entity.phrases]
    assert made.text.split(", ") == phrases, "each phrase stands by itself between commas"
    assert len(set(phrases)) == len(phrases)
    assert all(phrase == clean(phrase) for phrase in phrases)
    found = {entity.label for entity in made.entities} - {None}
    if labels == "tags":
        assert found <= present
        assert found == present or not append
    else:
        assert found == {named(p, INDEX) for group in caption_groups(caption) for p in group} - {None}
    for entity in made.entities:
        assert {named(p, INDEX) for p in entity.phrases} & (present if labels == "tags" else found) <= {entity.label}


@given(st.text())
def test_clean_is_stable(text):
    assert clean(clean(text)) == clean(text)
    assert re.fullmatch(r"[^\W_]*", re.sub(r"[ '-]", "", clean(text)))


@settings(deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])),
        st.lists(st.tuples(CAPTIONS, st.sets(st.integers(1, 9))), max_size=3),
        max_size=4,
    )
)
def test_round_trip(tmp_path_factory, drawn):
    prompts = {
        name: [p for c, present in each for p in Given(c)(name, None, tuple(present))] for name, each in drawn.items()
    }
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    write_prompts(path, prompts, CLASSES)
    source = Written(path, CLASSES)
    source.check(list(prompts))
    assert {name: source(name, None, ()) for name in prompts} == prompts
    assert len(path.read_bytes().splitlines()) == len(prompts)


TOKENIZER = clip_tokenizer(["person", "dog", "light", "traffic"], max_length=400)


@given(CAPTIONS)
def test_clip_finds_every_phrase(caption):
    """The words that CLIP's tokenizer makes of a phrase stand in those of the prompt, between commas."""

    def spelled(text):
        return [word.lower() for word, _ in words(TOKENIZER, TOKENIZER(text, truncation=True).input_ids)]

    for made in Given(caption, labels="caption")("a", None, ()):
        read = spelled(made.text)
        if len(TOKENIZER(made.text).input_ids) < 400:
            assert read == [w for p in made.text.split(", ") for w in (*spelled(p), ",")][:-1]


# ---- the released captions -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("file", "name"),
    [("voc", "voc"), ("context", "context"), ("coco-object", "coco-object"), ("coco-stuff", "coco-stuff-171"),
     ("city", "cityscapes"), ("ade", "ade20k")],
)  # fmt: skip
def test_released_captions(file, name):
    """Every caption makes one prompt of at most 75 tokens' worth of words, and nearly all name a class."""
    path = shared(f"goca_labels/{file}.json")
    source = Captions(path, ALL[name], aliases_of(name, ALL[name]), labels="caption")
    ids = list(json.loads(path.read_text()))
    source.check(ids)
    made = [source(sample, None, ())[0] for sample in ids]
    assert max(len(p.text.split()) for p in made) < 35
    assert sum(any(e.label is not None for e in p.entities) for p in made) > 0.95 * len(made)
