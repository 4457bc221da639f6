"""The names of attnlab, for editors and for `__init__.py`, which imports each when it is first used."""

from . import (
    cli as cli,
    dataset as dataset,
    joint as joint,
    learning as learning,
    maps as maps,
    masks as masks,
    metrics as metrics,
    pipelines as pipelines,
    plots as plots,
    recording as recording,
    scenes as scenes,
    segmentation as segmentation,
    storage as storage,
    tokens as tokens,
    training as training,
    widgets as widgets,
)
from .learning import (
    best_words as best_words,
    fit_token as fit_token,
    fit_tokens as fit_tokens,
    nearest_words as nearest_words,
    optimize_token as optimize_token,
    transfer_matrix as transfer_matrix,
)
from .maps import (
    HeatMaps as HeatMaps,
    LinearMap as LinearMap,
    concept_maps as concept_maps,
    contributions as contributions,
    daam as daam,
    goca as goca,
    linear_daam as linear_daam,
    ovam as ovam,
    propagate as propagate,
    std as std,
)
from .masks import (
    dbscan_clusters as dbscan_clusters,
    dbscan_mask as dbscan_mask,
    otsu_mask as otsu_mask,
    random_walker_mask as random_walker_mask,
    threshold_mask as threshold_mask,
    vote_mask as vote_mask,
)
from .pipelines import (
    load_pipeline as load_pipeline,
    seed as seed,
)
from .recording import (
    Recording as Recording,
    record as record,
    record_again as record_again,
    record_image as record_image,
)
from .segmentation import (
    load_segmenter as load_segmenter,
)
from .tokens import (
    Token as Token,
    TokenLibrary as TokenLibrary,
)

__version__: str
