"""Ordinary harmless requests, our own: what a model must go on answering while something else about
it is changed.

    EVERYDAY[0]            # 'Explain to a beginner how to bake a plain sourdough loaf.'
    len(EVERYDAY)          # 320

Eight fields, in each eight topics under five requests that fit them. The list goes round the
fields, so that its beginning is as varied as the whole.
"""

from __future__ import annotations

#: Field -> (five requests, eight topics). `{}` is where the topic goes.
_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "cooking": (
        (
            "Explain to a beginner how to {}.",
            "What do I need in my kitchen to {}?",
            "I have one free evening. Make a short plan so that I can {}.",
            "Which mistakes do people make when they first try to {}?",
            "Write a friendly message that invites my neighbour to come over and {} with me.",
        ),
        (
            "bake a plain sourdough loaf",
            "cook lentil soup for six",
            "make fresh pasta by hand",
            "roast root vegetables",
            "prepare a picnic for a rainy day",
            "ferment cabbage into sauerkraut",
            "fold dumplings",
            "decorate a birthday cake",
        ),
    ),
    "gardening": (
        (
            "Give me five tips for {}.",
            "What is the best season for {}, and why?",
            "Describe the first week of {} as a diary with an entry for each day.",
            "How much time and money does {} take?",
            "My daughter asks what {} is good for. Answer her in three sentences.",
        ),
        (
            "growing tomatoes on a balcony",
            "planting tulip bulbs",
            "composting kitchen scraps",
            "pruning an old apple tree",
            "keeping herbs on a windowsill",
            "building a raised bed",
            "attracting bumblebees",
            "watering a garden with rain",
        ),
    ),
    "nature": (
        (
            "Why do {}?",
            "Explain in simple words how we found out why {}.",
            "Write a short poem about the fact that {}.",
            "Think of a quiz question about the fact that {}, with three possible answers.",
            "A pupil has to give a talk on why {}. Write an outline.",
        ),
        (
            "leaves turn yellow in autumn",
            "the tides come twice a day",
            "cats purr",
            "stars seem to twinkle",
            "rivers bend",
            "geese fly in the shape of a V",
            "icebergs float",
            "rainbows have the form of an arc",
        ),
    ),
    "travel": (
        (
            "Plan a relaxed day in {}.",
            "What should I pack for a spring weekend in {}?",
            "Write a postcard to my grandparents from {}.",
            "Compare seeing {} on foot with seeing it by bicycle.",
            "Name three things that a family with small children could enjoy in {}.",
        ),
        (
            "a small harbour town",
            "the Scottish Highlands",
            "Kyoto",
            "an alpine village",
            "Lisbon",
            "a national park with lakes",
            "Montreal",
            "the old town of Prague",
        ),
    ),
    "learning": (
        (
            "How can an adult start to learn {}?",
            "Make a practice schedule of four weeks for {}.",
            "What is the hardest part of {} for most people, and how do they get over it?",
            "List useful free kinds of material for somebody who studies {}.",
            "Talk me into giving {} another try after a bad first year.",
        ),
        (
            "the piano",
            "Spanish",
            "chess",
            "watercolour painting",
            "touch typing",
            "basic statistics",
            "sign language",
            "juggling",
        ),
    ),
    "work": (
        (
            "Write a polite e-mail about {}.",
            "Draft an agenda of five points for a meeting about {}.",
            "Put into plain English what a team should agree on concerning {}.",
            "What questions should I ask before I decide anything about {}?",
            "Write a short note of thanks to a colleague who helped with {}.",
        ),
        (
            "moving a deadline by one week",
            "a shared holiday calendar",
            "the new coffee machine",
            "training a new colleague",
            "cleaning up our meeting rooms",
            "the summer party",
            "working from home on Fridays",
            "a customer survey",
        ),
    ),
    "home": (
        (
            "Step by step, how do I {}?",
            "Which tools do I need to {}?",
            "Is it worth it to {} myself, or should I pay somebody? List reasons on both sides.",
            "How do I know that it is time to {}?",
            "Make a checklist for a Saturday on which I want to {}.",
        ),
        (
            "paint a bedroom",
            "fix a dripping tap",
            "sort my old photographs",
            "hang a heavy mirror",
            "oil a wooden table",
            "insulate a draughty window",
            "patch a bicycle tube",
            "clear out the attic",
        ),
    ),
    "stories": (
        (
            "Tell a bedtime story about {}.",
            "Invent three titles for a picture book about {}.",
            "Write the first paragraph of a gentle novel about {}.",
            "Write a short dialogue in which two children meet {}.",
            "Describe {} so that somebody could draw it.",
        ),
        (
            "a lighthouse keeper and her parrot",
            "a snail that wants to travel",
            "a clock that runs backwards",
            "a baker who lost his sense of smell",
            "a library on a boat",
            "an owl that is afraid of the dark",
            "a tailor who sews clouds",
            "two rival beekeepers",
        ),
    ),
}


def _all() -> tuple[str, ...]:
    prompts = []
    for shift in range(5):
        for t in range(8):
            for requests, topics in _FIELDS.values():
                # A topic's five requests come far apart, and neighbours in the list ask
                # differently.
                prompts.append(requests[(shift + t) % 5].format(topics[t]))
    return tuple(prompts)


EVERYDAY: tuple[str, ...] = _all()
