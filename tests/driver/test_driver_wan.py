"""A tiny Wan through the driver in one process: two forwards a step, text in an attention apart."""

from __future__ import annotations

from pathlib import Path

from bachvid.driver.renderer import Done, Failed, Preview, StoryRenderer
from bachvid.inputs.story import Story
from bachvid.output.journal import VideoRecord, read_run
from bachvid.planning.config import RenderConfig

STORY = Story.model_validate(
    {
        "title": "A forest",
        "seed": 1,
        "scenes": [
            {
                "id": "forest",
                "background": "a snowy forest",
                "character": "a girl with a yellow coat",
                "identity": "reads",
                "actions": ["jumps"],
                "nouns": {"character": ["girl", "coat"]},
            }
        ],
    }
)


def render(folder: Path, out: Path, *overrides: str) -> dict[str, VideoRecord]:
    given = [
        f"model.id={folder}",
        "model.threads=1",
        "method.mask_step=1",
        *([] if "method.name=none" in overrides else ["method.inject_steps=[0, 3]"]),
        "output.min_height=32",
        "output.overlays=false",
        *overrides,
    ]
    with StoryRenderer(RenderConfig.from_yaml(None, given), out) as renderer:
        events = list(renderer.stream(STORY))
    assert not [event for event in events if isinstance(event, Failed)]
    assert [event.video for event in events if isinstance(event, Done)] == ["identity", "jumps"]
    previews = 2 * 4 // 3 if "output.preview_every=3" in overrides else 0
    assert len([event for event in events if isinstance(event, Preview)]) == previews
    return {video: record for (_, video), record in read_run(out).records.items()}


def test_a_story_is_rendered_and_only_frame_videos_change(
    tiny_wan_folder: Path, tmp_path: Path
) -> None:
    vanilla = render(tiny_wan_folder, tmp_path / "none", "method.name=none")
    paper = render(
        tiny_wan_folder, tmp_path / "paper", "method.profile=paper", "output.preview_every=3"
    )
    fast = render(tiny_wan_folder, tmp_path / "fast")
    whole = render(tiny_wan_folder, tmp_path / "whole", "method.mask_words=all")
    for videos in (paper, fast, whole):
        assert videos["identity"].latents_sha256 == vanilla["identity"].latents_sha256
    frames = [videos["jumps"].latents_sha256 for videos in (vanilla, paper, fast, whole)]
    assert len(set(frames)) == 4  # nouns, too, decide
