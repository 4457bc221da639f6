"""attnlab: what a diffusion model looks at, word by word, and the masks that come of it.

    import attnlab as al

    pipe = al.load_pipeline("tiny")
    with al.record(pipe) as recording:
        image = pipe("a burning house with smoke", generator=al.seed(7)).images[0]
    mask = al.dbscan_mask(al.daam(recording)["smoke"])

Names, all of them in `__init__.pyi`, are imported when they are first used: `import attnlab` is quick and does nothing.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
