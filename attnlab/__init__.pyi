"""The names of attnlab for editors, which do not see that they are imported when they are first used."""

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
    daam as daam,
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
__all__: list[str]
