"""What is counted in a data set, against what was painted by hand."""

import numpy as np
from test_exports import write_set

from attnlab.dataset.stats import count_dataset


def test_counts_are_those_of_painted_masks(tmp_path):
    labels = np.zeros((4, 8, 12), np.uint8)
    labels[0, 0, 0] = labels[0, 1, 1] = labels[0, 5, 5] = 1  # two pixels hang together by a corner
    labels[0, 7, 7] = 255
    labels[2, :2] = 1
    labels[2, 4:] = 2
    labels[3] = 2  # marked as bad
    dataset = write_set(tmp_path / "set", list(labels), ["fire", "smoke"])
    dataset.mark("images/000003.png")
    prompt = dataset.records[0]["prompt"]
    dataset.rejected = [{"prompt": prompt, "reason": f"near duplicate of {i:06d}"} for i in range(2)]
    dataset.rejected.append({"prompt": "another", "reason": "blank image"})
    found = count_dataset(dataset)
    assert (found["images"], found["background alone"], found["bad"], found["ignored"]) == (3, 1, 1, 1)
    assert found["sizes"] == {"12 x 8": 3}
    fire, smoke = found["classes"]["fire"], found["classes"]["smoke"]
    assert fire == {"images": 2, "pixels": 27, "share": 27 / 288, "regions": 3, "median region": 2}
    assert smoke == {"images": 1, "pixels": 48, "share": 48 / 288, "regions": 1, "median region": 48}
    assert found["rejected"] == {"near duplicate": 2, "blank image": 1}
    assert sum(kept for kept, _ in found["prompts"].values()) == 3
    assert found["prompts"][prompt][1] == 2 and found["prompts"]["another"] == [0, 1]
