import dataclasses
import json

import pytest

from kvlatent.model.config import LatentConfig
from kvlatent.model.table import RotaryTable
from kvlatent.model.widths import Widths, width_per_layer


def make(**changes):
    table = RotaryTable((1.0, 0.1))
    fields = {
        "d_qk": 4,
        "d_vo": 6,
        "tables": ((table,),),
        "channels": (((0, 1, 4, 5),),),
        "original_head_dim": 8,
        "original_model_type": "llama",
    }
    return LatentConfig(**{**fields, **changes})


def test_json_round_trip_keeps_every_bit():
    long_table = RotaryTable((1 / 3, 1e-7), (0.2, 1e-8), switch=64, attention_factor=1.19)
    config = make(tables=((long_table,),), keys="stride", scale="d_qk")
    assert LatentConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    per_layer = make(
        d_qk=(4, 2),
        d_vo=(6, 8),
        tables=((RotaryTable((1.0, 0.1)),), (RotaryTable((1.0,)),)),
        channels=(((0, 1, 4, 5),), ((0, 4),)),
    )
    assert LatentConfig.from_dict(json.loads(json.dumps(per_layer.to_dict()))) == per_layer
    assert per_layer.d_qk_at(1) == 2 and per_layer.d_vo_at(0) == 6 and not per_layer.one_table


def test_cache_bytes_is_the_sum_over_layers():
    assert (
        make().cache_bytes_per_token(num_layers=3, num_key_value_heads=2, element_size=2)
        == 3 * 2 * (4 + 6) * 2
    )
    uneven = make(d_vo=(6, 8, 2))
    assert uneven.cache_bytes_per_token(3, 2, 4) == 2 * 4 * (3 * 4 + 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_qk": 5}, "d_qk must be even.*d_qk=5, head_dim=8; try 4 or 6"),
        ({"d_qk": 10}, "d_qk cannot exceed head_dim: got d_qk=10, head_dim=8; try 4"),
        ({"d_vo": 0}, "d_vo must be a positive integer: got d_vo=0, head_dim=8; try 4"),
        ({"d_vo": -2}, "d_vo must be a positive integer: got d_vo=-2"),
        ({"d_qk": True}, "d_qk must be a positive integer"),
        ({"d_qk": 1}, "d_qk=1, head_dim=8; try 2$"),
        ({"scale": "nonsense"}, "scale is one of original, d_qk: got 'nonsense'"),
        ({"qk_norm": "nonsense"}, "qk_norm is one of none, full, sliced: got 'nonsense'"),
        ({"version": 99}, "version 99 but this kvlatent reads up to 1; update"),
        ({"channels": ()}, "same layers: got 1 and 0"),
    ],
)
def test_bad_fields_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_widths_are_one_number_or_one_per_layer():
    assert Widths.check(4, [6, 8, 2], 8, 3) == (4, (6, 8, 2))
    assert Widths.check([4, 4, 4], (6,) * 3, 8, 3) == (4, 6)  # agreed by all layers
    assert Widths.check([4, 4], 6, 8) == ((4, 4), 6)  # of how many layers is not known yet
    assert Widths(4, (6, 8)).per_layer(2) == [(4, 6), (4, 8)]
    assert Widths(4, (6, 8)).to_dict() == {"d_qk": 4, "d_vo": [6, 8]}
    assert width_per_layer(4, 3) == (4, 4, 4) and width_per_layer([4, 2], 3) == (4, 2)
    assert make(d_vo=[6, 8]).d_vo == (6, 8)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ((4, [6, 8]), "a list of d_vo needs one width per layer: got 2 for 3 layers"),
        (([], 6), "a list of d_qk needs one width per layer: got 0 for 3 layers"),
        (([4, 4, 3], 6), "d_qk must be even, .*got d_qk=3, head_dim=8; try 2 or 4"),
        ((4, [6, 9, 6]), "d_vo cannot exceed head_dim: got d_vo=9, head_dim=8; try 4"),
        ((4, [6, 6, 0.5]), "d_vo must be a positive integer: got d_vo=0.5"),
        (("4", 6), "d_qk must be a positive integer: got d_qk=4"),
        ((None, 6), "d_qk must be a positive integer: got d_qk=None"),
    ],
)
def test_bad_widths_are_refused(widths, message):
    with pytest.raises(ValueError, match=message):
        Widths.check(*widths, 8, 3)


def test_bad_tables_are_refused():
    with pytest.raises(ValueError, match="as many frequencies as the short one: got 1 and 2"):
        RotaryTable((1.0, 0.1), (1.0,), switch=4)
    with pytest.raises(ValueError, match="finite frequencies: got NaN or infinity"):
        RotaryTable((1.0, float("nan")))
    with pytest.raises(ValueError, match="come together: got long=True, switch=None"):
        RotaryTable((1.0,), (1.0,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_vo": (6, 6)}, "one width per layer: got 2 for 3 layers"),
        ({"tables": ((RotaryTable((1.0,)),),) * 2, "channels": (((0, 1, 4, 5),),) * 2}, "got 2 for 3 layers"),
        ({"tables": ((RotaryTable((1.0,)),) * 3,)}, "layer 0 needs 1 or 2 rotary tables.*got 3 and 1"),
        ({"tables": ((RotaryTable((1.0,) * 3),),)}, "d_qk=4 but a rotary table for 6 channels and 4 kept"),
        ({"channels": (((0, 1),),)}, "rotary table for 4 channels and 2 kept"),
        ({"channels": (((0, 1, 4, 8),),)}, r"different channels in \[0, 8\): got 0 to 8, 4 different"),
        ({"channels": (((0, 1, 4, 4),),)}, "got 0 to 4, 3 different"),
        (
            {
                "tables": ((RotaryTable((1.0, 0.1)), RotaryTable((1.0, 0.1), attention_factor=2.0)),),
                "channels": (((0, 1, 4, 5),) * 2,),
            },
            r"heads of layer 0 must share .* got \(2, 0, 1.0\) and \(2, 0, 2.0\)",
        ),
    ],
)
def test_a_config_that_does_not_fit_the_model_is_refused(changes, message):
    make().check_model(range(3), num_key_value_heads=2)
    with pytest.raises(ValueError, match=message):
        make(**changes).check_model(range(3), num_key_value_heads=2)


def test_damaged_json_is_refused():
    data = make().to_dict()
    del data["widths"]
    with pytest.raises(ValueError, match=r"damaged \(widths: Field required\); convert the model again"):
        LatentConfig.from_dict(data)
    data = make().to_dict()
    data["widths"]["d_qk"] = "16"
    with pytest.raises(ValueError, match="positive integer: got d_qk=16"):
        LatentConfig.from_dict(data)


def test_the_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().d_qk = 2
