"""Make labeled data sets from prompts: a recipe in, image and mask pairs out, verified and exported.

recipe = Recipe.load(find_recipe("flood-tiny"))    # one that comes with attnlab; or write your own:
recipe = Recipe(prompts=["a burning house with fire and smoke"], classes={"fire": "fire", "smoke": "smoke"}, images=50)
dataset = generate_dataset(recipe, "fires")        # run it again after an interruption: it goes on
dataset[0].image, dataset[0].labels                # PIL image, uint8 (row, column) of class numbers
verify_dataset("fires")                            # [] where nothing is missing, cut short or altered
export_coco(dataset, "fires.json")                 # or, with splits, for other tools that train:
export_yolo(dataset, "fires-yolo", splits=split_dataset(dataset))
pairs = open_pairs("fires")                        # `attnlab.segmentation.train_segmenter` learns from these

Your own photos are labeled in the place of generated images, by words that need not be in a prompt:
Recipe(photos="holiday", classes={"dog": "dog"}, map="ovam"), or photos=Photos("holiday", tiles=2, looks=5)
"""

from .exports import export_coco, export_segformer, export_voc, export_yolo
from .instances import split_instances
from .labeling import Labeling, label
from .leaks import Leak, find_leaks
from .making import generate_dataset
from .pairs import open_pairs
from .photos import Photos
from .recipe import Recipe
from .records import Dataset, Pair, difference_hash, verify_dataset
from .rules import Filters
from .shipped import find_recipe, known_recipes
from .splits import split_dataset
from .stats import count_dataset

__all__ = [
    "Dataset", "Filters", "Labeling", "Leak", "Pair", "Photos", "Recipe", "count_dataset", "difference_hash",
    "export_coco", "export_segformer", "export_voc", "export_yolo", "find_leaks", "find_recipe", "generate_dataset",
    "known_recipes", "label", "open_pairs", "split_dataset", "split_instances", "verify_dataset",
]  # fmt: skip
