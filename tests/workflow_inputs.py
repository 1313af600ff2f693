"""What the saved workflows read from ComfyUI's input folder, and the small model under the published names."""

from __future__ import annotations

import av
import numpy as np

from runner.server import Server
from small_model import recipe, world

#: Frames of the clip to go on from.
CLIP_FRAMES = 32


def give(server: Server) -> None:
    """Put a first and a last picture and a clip into a server's input folder, and the models into its own."""
    from PIL import Image

    (server.models / "checkpoints" / "svd_xt.safetensors").symlink_to(recipe.CHECKPOINT)
    (server.models / "exvideo" / "ExVideo-SVD-128f-v1.fp16.safetensors").symlink_to(recipe.EXTENSION)
    pictures = (world.render(world.sample(world.HELD_OUT), CLIP_FRAMES) * 255).round().astype(np.uint8)
    for name, frame in (("example.png", 0), ("last.png", 20)):
        Image.fromarray(pictures[frame]).save(server.input / name)
    with av.open(str(server.input / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", 30, options={"crf": "10"})
        stream.width = stream.height = world.SIZE
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())
