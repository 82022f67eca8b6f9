"""Names of joints: what is written is read again, and what cannot be read is told."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from connectors.errors import UnknownNameError, VlmError
from vlm_encoders.encoders.joint_name import JointName, PartName, Value, map_places, parse_joint, write_joint
from vlm_encoders.registry import encoder_spec

words = st.text(st.sampled_from("abc-_.:/+[]"), min_size=1, max_size=8).map(lambda text: f"n{text}n")
values = st.one_of(
    st.booleans(),
    st.integers(-99, 999),
    st.floats(allow_nan=False, allow_infinity=False),
    st.lists(st.integers(-9, 99), min_size=2, max_size=3).map(tuple),
    st.sampled_from(["sdpa", "a b", "x/y.z"]),
)
keys = st.sampled_from(["image_size", "feature_layer", "grid", "depth", "drop"])
options = st.dictionaries(keys, values, max_size=3)
parts = st.builds(PartName, words, options)
joints = st.builds(JointName, st.sampled_from(["fused", "multiscale"]), options, st.lists(parts, min_size=1).map(tuple))


@given(joint=joints)
@settings(max_examples=200, deadline=None)
def test_what_is_written_is_read_again(joint: JointName) -> None:
    name = write_joint(joint)
    # A negative side has no written form: "x" takes whole numbers from 0.
    assert name is None or parse_joint(name) == joint
    given_options = [joint.options, *(part.options for part in joint.parts)]
    sizes = [each.get(key) for each in given_options for key in ("grid", "image_size")]
    if not any(isinstance(size, tuple) and min(size) < 0 for size in sizes):
        assert name is not None
        nested = JointName("fused", {}, (PartName(name), PartName("b")))
        written = write_joint(nested)
        assert written is not None
        assert parse_joint(written) == nested


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("448", 448),
        ("336x448", (336, 448)),
        ("-2/-5", (-2, -5)),
        ("true", True),
        ("0.1", 0.1),
        ("1e-05", 1e-5),
        ("sdpa", "sdpa"),
    ],
)
def test_values(text: str, value: Value) -> None:
    (part, _) = parse_joint(f"fused:a[option={text}]+b").parts
    assert part.options == {"option": value}


def test_a_revision_of_digits_is_text() -> None:
    assert parse_joint("fused:a[revision=0012]+b").parts[0].options == {"revision": "0012"}


def test_parentheses_hold_what_would_part() -> None:
    joint = parse_joint(
        "fused[fuse=sequence]:(hf:/data/a+b[c])[image_size=32] + (fused:a+b)+multiscale[scales=1/2]:c[d=1]"
    )
    assert joint.options == {"fuse": "sequence"}
    assert joint.parts == (
        PartName("hf:/data/a+b[c]", {"image_size": 32}),
        PartName("fused:a+b"),
        PartName("multiscale[scales=1/2]:c[d=1]"),
    )


def test_folders_are_changed_wherever_they_stand() -> None:
    name = "fused:hf:x[pretrained=w]+(multiscale:(timm:y+z))+clip-vit-b-32"
    changed = map_places(name, lambda place: f"/root/{place}")
    assert changed == "fused:hf:/root/x[pretrained=/root/w]+(multiscale:(timm:/root/y+z))+clip-vit-b-32"
    assert map_places("hf:x", str.upper) == "hf:X"
    assert map_places("clip-vit-b-32", str.upper) == "clip-vit-b-32"


@pytest.mark.parametrize(
    "option", [{"options": [1, "a"]}, {"options": "a,b"}, {"options": (3,)}, {"options": None}, {"depth": "7"}]
)
def test_what_has_no_written_form_is_not_written(option: dict[str, Value]) -> None:
    assert write_joint(JointName("fused", {}, (PartName("a", option), PartName("b")))) is None


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("fused[", r"'fused\[' is no joint of encoders; write fused:NAME\+NAME"),
        ("fused:tiny-digits", "takes two encoders or more, got 1"),
        ("fused:tiny-digits++tiny-digits", "has an empty part"),
        ("fused:tiny-digits[depth+tiny-digits", "do not pair up"),
        ("fused:(tiny-digits+tiny-digits", "do not pair up; close each one"),
        ("fused:tiny-digits)+tiny-digits", "do not pair up"),
        ("fused:tiny-digits]+tiny-digits", "put a name that holds one into parentheses"),
        ("fused:tiny-digits[depth=3]x+tiny-digits", r"behind 'tiny-digits' stands '\[depth=3\]x'"),
        ("fused:tiny-digits[depth]+tiny-digits", "option 'depth' is not option=value"),
        ("fused:tiny-digits[a=1,a=2]+tiny-digits", "gives option 'a' twice"),
        ("fused[gird=3x3]:tiny-digits+tiny-digits", "fused has no option 'gird'; did you mean grid"),
        ("fused[grid=3]:tiny-digits+tiny-digits", "a grid is .rows, columns., got 3; write grid=24x24"),
        ("fused[fuse=sum]:tiny-digits+tiny-digits", "fuse 'sum' is unknown; use channel, sequence, interleave"),
        ("fused[resampling=cubic]:tiny-digits+tiny-digits", "resampling 'cubic' is unknown; use area"),
        ("fused:tiny-digits[image_size=60]+tiny-digits", "60 is not a multiple of 8; use 56 or 64"),
        ("fused:tiny-digits[image_size=big]+tiny-digits", "image_size=big is not understood"),
        ("fused:tiny-digits[final_norm=yes]+tiny-digits", "final_norm=yes is not understood; give true or false"),
        ("fused:tiny-digits[resize=fit]+tiny-digits", "resize 'fit' is unknown; use crop"),
        ("fused:(fused:tiny-digits+tiny-digits)[revision=x]+tiny-digits", "one revision cannot be that of each part"),
        ("fused:(fused:tiny-digits+tiny-digits)[pretrained=x]+tiny-digits", "one pretrained cannot be that of each"),
        ("multiscale:tiny-digits+tiny-digits", "multiscale takes one encoder, got 2; put it into parentheses"),
        ("multiscale[scales=2/1]:tiny-digits", "scales are growing whole numbers"),
        ("multiscale:(fused:tiny-digits+tiny-digits)", "cannot be cut; put multiscale around each part"),
    ],
)
def test_mistakes_are_one_sentence(name: str, sentence: str) -> None:
    with pytest.raises(VlmError, match=sentence):
        encoder_spec(name)


def test_an_unknown_part_is_named_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="no encoder 'tiny-digit'; did you mean tiny-digits"):
        encoder_spec("fused:tiny-digit+tiny-digits")
    with pytest.raises(UnknownNameError, match="no encoder"):
        encoder_spec("hf[a=1]:tiny")
