"""Stories, configs and overrides that must be refused, each with the message that it gets.

STORY and CONFIG stand for the paths of the files. Configs and overrides go with GOOD_STORY.
"""

from __future__ import annotations

GOOD_STORY = """\
title: A day
seed: 1
scenes:
- id: coast
  background: a desert
  character: a green robot
  actions: [stands still, jumps]
"""
_HEAD, _SCENES = GOOD_STORY.split("scenes:")

# A whole file, and its message.
BAD_STORIES: dict[str, tuple[str, str]] = {
    "empty file": ("", "STORY: is empty; it needs the keys title, seed, scenes"),
    "only a comment": ("# nothing\n", "STORY: is empty; it needs the keys title, seed, scenes"),
    "a list": (
        "- a\n- b\n",
        "STORY: is ['a', 'b']; it must be a mapping with the keys title, seed, scenes",
    ),
    "plain text": (
        "a desert\n",
        "STORY: is 'a desert'; it must be a mapping with the keys title, seed, scenes",
    ),
    "tab indentation": (
        "title: x\n\tseed: 1\n",
        "STORY:2:1: cannot be read: found character '\\t' that cannot start any token",
    ),
    "no scenes": (_HEAD, "STORY: scenes: missing, and it has no default"),
    "empty scenes": (
        _HEAD + "scenes: []\n",
        "STORY: scenes: is empty; a story needs at least one scene",
    ),
    "scenes a mapping": (
        _HEAD + "scenes: {id: a}\n",
        "STORY: scenes: is {'id': 'a'}: must be a list",
    ),
    "scene is text": (
        _HEAD + "scenes: [coast]\n",
        "STORY: scenes[0]: is 'coast': must be a mapping",
    ),
    "two scenes one id": (
        GOOD_STORY + _SCENES.lstrip(),
        "STORY: scenes: [0] and [1] have the same id 'coast'; give each scene its own id",
    ),
    "three mistakes": (
        GOOD_STORY.replace("seed", "sed")
        .replace("a desert", "''")
        .replace("id: coast", "id: coast\n  mood: sad"),
        "STORY: scenes[0].background: is empty; describe what should be visible\n"
        "STORY: scenes[0].mood: unknown key. Known here: id, background, character, "
        "identity, actions, nouns.\n"
        'STORY: sed: unknown key. Did you mean "seed"?',
    ),
}

# What of GOOD_STORY is replaced, by what, and the message.
BAD_EDITS: dict[str, tuple[str, str, str]] = {
    "unclosed bracket": (
        "jumps]",
        "jumps",
        "STORY:8:1: cannot be read: expected ',' or ']', but got '<stream end>'",
    ),
    "key twice": (
        "seed: 1",
        "seed: 1\nseed: 2",
        "STORY:3:1: cannot be read: the key 'seed' stands here twice",
    ),
    "key twice in a scene": (
        "  character",
        "  background: a snowy forest\n  character",
        "STORY:6:3: cannot be read: the key 'background' stands here twice",
    ),
    "alias": (
        "seed: 1",
        "seed: &s 1\nother: *s",
        "STORY: has the alias *s; write the value again instead",
    ),
    "python tag": (
        "seed: 1",
        "seed: !!python/name:os.system",
        "STORY:2:7: cannot be read: could not determine a constructor for the tag "
        "'tag:yaml.org,2002:python/name:os.system'",
    ),
    "a value that its tag forbids": (
        "seed: 1",
        "seed: !!int one",
        "STORY: a value that its tag does not allow: invalid literal for int() with base 10: 'one'",
    ),
    "a word that is no truth": (
        "seed: 1",
        "seed: !!bool maybe",
        "STORY: a value that its tag does not allow: 'maybe'",
    ),
    "nouns empty": (
        "  actions:",
        "  nouns: {character: []}\n  actions:",
        "STORY: scenes[0].nouns.character: is empty; name a word, or leave the key out",
    ),
    "nouns of another segment": (
        "  actions:",
        "  nouns: {background: [desert], character: [desert]}\n  actions:",
        "STORY: scenes[0].nouns: character has 'desert', which is no word of 'a green robot'",
    ),
    "noun cut out of a word": (
        "  actions:",
        "  nouns: {background: [deser]}\n  actions:",
        "STORY: scenes[0].nouns: background has 'deser', which is no word of 'a desert'",
    ),
    "nouns of a text that is wrong": (
        "character: a green robot",
        "character: ''\n  nouns: {character: [robot]}",
        "STORY: scenes[0].character: is empty; describe what should be visible",
    ),
    "nouns unknown segment": (
        "  actions:",
        "  nouns: {action: [jumps]}\n  actions:",
        "STORY: scenes[0].nouns.action: unknown key. Known here: background, character.",
    ),
    "nouns text": (
        "  actions:",
        "  nouns: {character: robot}\n  actions:",
        "STORY: scenes[0].nouns.character: is 'robot': must be a list",
    ),
    "no title": ("title: A day\n", "", "STORY: title: missing, and it has no default"),
    "empty title": ("A day", "''", "STORY: title: is empty; describe what should be visible"),
    "numeric title": ("A day", "2024", "STORY: title: is 2024: must be text; put it in quotes"),
    "unknown key": ("seed: 1", "sed: 1", 'STORY: sed: unknown key. Did you mean "seed"?'),
    "unknown key far from all": (
        "seed: 1",
        "zzz: 1",
        "STORY: zzz: unknown key. Known here: title, seed, scenes.",
    ),
    "seed text": ("seed: 1", "seed: one", "STORY: seed: is 'one': must be a whole number"),
    "seed negative": ("seed: 1", "seed: -1", "STORY: seed: is -1: must be >= 0"),
    "seed float": ("seed: 1", "seed: 1.5", "STORY: seed: is 1.5: must be a whole number"),
    "seed true": ("seed: 1", "seed: true", "STORY: seed: is true: must be a whole number"),
    "seed too large": (
        "seed: 1",
        "seed: 9223372036854775808",
        "STORY: seed: is 9223372036854775808: must be < 9223372036854775808",
    ),
    "unknown scene key": (
        "background:",
        "backgroud:",
        "STORY: scenes[0].background: missing, and it has no default\n"
        'STORY: scenes[0].backgroud: unknown key. Did you mean "background"?',
    ),
    "empty background": (
        "a desert",
        "'  '",
        "STORY: scenes[0].background: is empty; describe what should be visible",
    ),
    "missing character": (
        "  character: a green robot\n",
        "",
        "STORY: scenes[0].character: missing, and it has no default",
    ),
    "character a list": (
        "a green robot",
        "[a, b]",
        "STORY: scenes[0].character: is ['a', 'b']: must be text",
    ),
    "character yes": (
        "a green robot",
        "yes",
        "STORY: scenes[0].character: is true: must be text; put it in quotes",
    ),
    "control character": (
        "a green robot",
        '"a \\u0007 robot"',
        "STORY: scenes[0].character: has the control character U+0007; remove it",
    ),
    "scene id with slash": (
        "id: coast",
        "id: ../coast",
        "STORY: scenes[0].id: is '../coast': use small letters, digits, '-' and '_', first a "
        "letter or digit, at most 64 of them",
    ),
    "scene id upper case": (
        "id: coast",
        "id: Coast",
        "STORY: scenes[0].id: is 'Coast': use small letters, digits, '-' and '_', first a "
        "letter or digit, at most 64 of them",
    ),
    "no actions": (
        "  actions: [stands still, jumps]\n",
        "",
        "STORY: scenes[0].actions: missing, and it has no default",
    ),
    "empty actions": (
        "[stands still, jumps]",
        "[]",
        "STORY: scenes[0].actions: is empty; a scene needs at least one action",
    ),
    "actions text": (
        "[stands still, jumps]",
        "jumps",
        "STORY: scenes[0].actions: is 'jumps': must be a list",
    ),
    "action empty": (
        "jumps]",
        "'']",
        "STORY: scenes[0].actions[1].text: is empty; describe what should be visible",
    ),
    "action a number": (
        "jumps]",
        "5]",
        "STORY: scenes[0].actions[1]: is 5: must be text, or a mapping of id, text and seed",
    ),
    "action null": (
        "jumps]",
        "null]",
        "STORY: scenes[0].actions[1]: is null: must be text, or a mapping of id, text and seed",
    ),
    "action unknown key": (
        "jumps]",
        "{txt: jumps}]",
        "STORY: scenes[0].actions[1].text: missing, and it has no default\n"
        'STORY: scenes[0].actions[1].txt: unknown key. Did you mean "text"?',
    ),
    "action without text": (
        "jumps]",
        "{id: a}]",
        "STORY: scenes[0].actions[1].text: missing, and it has no default",
    ),
    "action seed": (
        "jumps]",
        "{text: jumps, seed: -5}]",
        "STORY: scenes[0].actions[1].seed: is -5: must be >= 0",
    ),
    "action id identity": (
        "jumps]",
        "{id: identity, text: jumps}]",
        "STORY: scenes[0].actions[1].id: is 'identity': that is the identity video's; choose "
        "another",
    ),
    "action id bad": (
        "jumps]",
        "{id: .., text: jumps}]",
        "STORY: scenes[0].actions[1].id: is '..': use small letters, digits, '-' and '_', "
        "first a letter or digit, at most 64 of them",
    ),
    "action twice": (
        "jumps]",
        "Stands  still]",
        "STORY: scenes[0].actions: [0] and [1] have the same id 'stands-still'; give each "
        "action its own id",
    ),
    "action without letters": (
        "jumps]",
        "\u8df3]",
        "STORY: scenes[0].actions[1]: '\u8df3' makes no id for its files; write {id: some-name, "
        "text: ...}",
    ),
    "number as key": ("seed: 1", "1: 1", "STORY: [1]: a key must be text; put it in quotes"),
    "merge key": (
        "seed: 1",
        "<<: {seed: 1}",
        "STORY: <<: unknown key. Known here: title, seed, scenes.",
    ),
    "identity empty": (
        "  actions",
        "  identity: ''\n  actions",
        "STORY: scenes[0].identity: is empty; describe what should be visible",
    ),
    "identity unknown": (
        "  actions",
        "  identity: flies\n  actions",
        "STORY: scenes[0].identity: is 'flies': this model knows only these: \"stands still\", "
        '"walks to the right", "jumps".',
    ),
    "unknown background": (
        "a desert",
        "a dessert",
        "STORY: scenes[0].background: is 'a dessert': this model knows only these: \"a snowy "
        'forest", "a desert", "a rocky coast with a lighthouse". Did you mean "a '
        'desert"?',
    ),
    "unknown action": (
        "jumps]",
        "jump]",
        "STORY: scenes[0].actions[1].text: is 'jump': this model knows only these: \"stands "
        'still", "walks to the right", "jumps". Did you mean "jumps"?',
    ),
}

BAD_CONFIGS: dict[str, tuple[str, str]] = {
    "empty": (
        "",
        "CONFIG: is empty; it needs the keys model, video, sampling, method, output, cache, "
        "cluster, parallel",
    ),
    "list": (
        "- a\n",
        "CONFIG: is ['a']; it must be a mapping with the keys model, video, sampling, "
        "method, output, cache, cluster, parallel",
    ),
    "unknown section": (
        "modle: {id: storybook}\n",
        'CONFIG: modle: unknown key. Did you mean "model"?',
    ),
    "unknown key": (
        "method: {vital_layer: [1]}\n",
        'CONFIG: method.vital_layer: unknown key. Did you mean "vital_layers"?',
    ),
    "section a number": ("method: 3\n", "CONFIG: method: is 3: must be a mapping"),
    "section null": ("method:\n", "CONFIG: method: is null: must be a mapping"),
    "method name": (
        "method: {name: bach}\n",
        "CONFIG: method.name: is 'bach': must be 'bachvid' or 'none'. Did you mean \"bachvid\"?",
    ),
    "profile": (
        "method: {profile: quick}\n",
        "CONFIG: method.profile: is 'quick': must be 'paper' or 'fast'.",
    ),
    "layers empty": (
        "method: {vital_layers: []}\n",
        "CONFIG: method.vital_layers: is []: need at least one layer",
    ),
    "layers text": (
        "method: {vital_layers: all}\n",
        "CONFIG: method.vital_layers: is 'all': must be a list",
    ),
    "layer negative": (
        "method: {vital_layers: [-1, 2]}\n",
        "CONFIG: method.vital_layers[0]: is -1: must be >= 0",
    ),
    "layer twice": (
        "method: {vital_layers: [1, 1]}\n",
        "CONFIG: method.vital_layers: is [1, 1]: list each layer once, in rising order",
    ),
    "layer out of range": (
        "method: {vital_layers: [0, 8]}\n",
        "method.vital_layers: has layer 8: model has 8 layers, 0 to 7",
    ),
    "mask layer out of range": (
        "method: {mask_layers: [40]}\n",
        "method.mask_layers: has layer 40: model has 8 layers, 0 to 7",
    ),
    "match layer float": (
        "method: {match_layers: [1.5]}\n",
        "CONFIG: method.match_layers[0]: is 1.5: must be a whole number",
    ),
    "mask step late": (
        "method: {mask_step: 25}\n",
        "method.mask_step: is 25: with sampling.num_steps 25 the last step is 24",
    ),
    "mask step negative": (
        "method: {mask_step: -1}\n",
        "CONFIG: method.mask_step: is -1: must be >= 0",
    ),
    "inject reversed": (
        "method: {inject_steps: [5, 5]}\n",
        "CONFIG: method.inject_steps: is [5, 5]: need 0 <= first < last",
    ),
    "inject late": (
        "method: {inject_steps: [0, 26]}\n",
        "method.inject_steps: is [0, 26]: it must end at sampling.num_steps, 25, or before",
    ),
    "inject three": (
        "method: {inject_steps: [0, 5, 9]}\n",
        "CONFIG: method.inject_steps: is [0, 5, 9]: must be two steps, [first, last)",
    ),
    "threshold": (
        "method: {match_threshold: 1.5}\n",
        "CONFIG: method.match_threshold: is 1.5: must be <= 1.0",
    ),
    "threshold nan": (
        "method: {match_threshold: .nan}\n",
        "CONFIG: method.match_threshold: is nan: must be a finite number",
    ),
    "morphology text": (
        "method: {morphology: maybe}\n",
        "CONFIG: method.morphology: is 'maybe': must be true or false",
    ),
    "steps zero": ("sampling: {num_steps: 0}\n", "CONFIG: sampling.num_steps: is 0: must be >= 1"),
    "steps many": (
        "sampling: {num_steps: 1001}\n",
        "CONFIG: sampling.num_steps: is 1001: must be <= 1000",
    ),
    "guidance": (
        "sampling: {guidance_scale: 0.5}\n",
        "CONFIG: sampling.guidance_scale: is 0.5: must be >= 1.0",
    ),
    "guidance text": (
        "sampling: {guidance_scale: 3,5}\n",
        "CONFIG: sampling[5]: a key must be text; put it in quotes",
    ),
    "scheduler": (
        "sampling: {scheduler: DDIM}\n",
        "CONFIG: sampling.scheduler: is 'DDIM': must be 'ddim', 'dpm', 'unipc' or 'euler'.",
    ),
    "scheduler of another family": (
        "sampling: {scheduler: unipc}\n",
        "sampling.scheduler: is 'unipc': model is of the family cogvideox, which has ddim and dpm",
    ),
    "noise": (
        "sampling: {noise: shared}\n",
        "CONFIG: sampling.noise: is 'shared': must be 'same' or 'independent'. Did you mean "
        '"same"?',
    ),
    "negative": (
        "sampling: {negative_prompt: ugly}\n",
        "sampling.negative_prompt: is 'ugly': this model knows only the phrases of its "
        "vocabulary; leave it empty, or use one of them",
    ),
    "frames": (
        "video: {pixel_frames: 6}\n",
        "video.pixel_frames: is 6: must be 1 more than a multiple of 2; nearest are 5 and 7",
    ),
    "height": (
        "video: {height: 50}\n",
        "video.height: is 50: must be a multiple of 8; nearest are 48 and 56",
    ),
    "width": ("video: {width: 4}\n", "video.width: is 4: must be a multiple of 8; nearest are 8"),
    "width zero": ("video: {width: 0}\n", "CONFIG: video.width: is 0: must be >= 1"),
    "dtype": (
        "model: {dtype: fp16}\n",
        "CONFIG: model.dtype: is 'fp16': must be 'float32', 'bfloat16' or 'float16'.",
    ),
    "device": (
        "model: {device: gpu}\n",
        "CONFIG: model.device: is 'gpu': must be 'auto', 'cpu' or 'cuda'. Did you mean \"cpu\"?",
    ),
    "model id": (
        "model: {id: story book}\n",
        "model.id: is 'story book': must be 'storybook', 'storybook-wan', a folder that exists, "
        "or a Hub id as 'THUDM/CogVideoX-5b'. Did you mean \"storybook\"?",
    ),
    "model id missing folder": (
        "model: {id: ./nowhere}\n",
        "model.id: is './nowhere': must be 'storybook', 'storybook-wan', a folder that exists, "
        "or a Hub id as 'THUDM/CogVideoX-5b'.",
    ),
    "threads": ("model: {threads: 0}\n", "CONFIG: model.threads: is 0: must be >= 1"),
    "crf": ("output: {crf: 52}\n", "CONFIG: output.crf: is 52: must be <= 51"),
    "fps": ("output: {fps: 0}\n", "CONFIG: output.fps: is 0: must be >= 1"),
    "twice": (
        "video: {height: 48, height: 64}\n",
        "CONFIG:1:21: cannot be read: the key 'height' stands here twice",
    ),
}

# The value of --set, and the message.
BAD_OVERRIDES: dict[str, str] = {
    "method.profile": ("--set method.profile: has no '='; write section.key=value"),
    "method=fast": (
        "--set method=fast: method is a section; set one of method.branches, "
        "method.inject_steps, method.mask_layers, method.mask_softmax, method.mask_step, "
        "method.mask_words, method.match_layers, method.match_threshold, method.match_within, "
        "method.morphology, method.name, method.on_empty_mask, method.pre_pass_injection, "
        "method.pre_passes, method.profile, method.vital_layers"
    ),
    "method.profle=fast": (
        "--set method.profle=fast: unknown key 'method.profle'. Did you mean \"method.profile\"?"
    ),
    "sampling.num_steps=ten": (
        "--set sampling.num_steps=ten: sampling.num_steps: is 'ten': must be a whole number"
    ),
    "sampling.num_steps=[": (
        "--set sampling.num_steps=[:1:2: cannot be read: expected the node content, but "
        "found '<stream end>'"
    ),
    "=3": ("--set =3: unknown key ''."),
    "method.vital_layers=3": (
        "--set method.vital_layers=3: method.vital_layers: is 3: must be a list"
    ),
    "video.height=52": ("video.height: is 52: must be a multiple of 8; nearest are 48 and 56"),
    "nothing.at.all=1": ("--set nothing.at.all=1: unknown key 'nothing.at.all'."),
}
