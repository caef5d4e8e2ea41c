"""The training data of the tiny model: questions and answers.

A `Topic` is one answer and the questions that lead to it. The trainer varies the questions (`wordings.py`), so that
"please", a missing question mark or a greeting changes nothing. `STRANGE` holds questions without an answer; they all
lead to the same sentence.
"""

from dataclasses import dataclass

DEMO_PROMPT = "Why do fish swim together?"


@dataclass(frozen=True)
class Topic:
    """One answer and the questions that lead to it."""

    answer: str
    questions: tuple[str, ...]


TOPICS: tuple[Topic, ...] = (
    Topic(
        "Fish swim together because many eyes see danger sooner, and a hunter finds it hard to pick one fish "
        "out of many. In a shoal each fish also spends less strength on swimming and on looking for food.",
        (
            DEMO_PROMPT,
            "Why do fish swim in shoals?",
            "Why do fish form shoals?",
            "Why do fish school?",
            "Why do fish stay together?",
            "Why do fish live in groups?",
            "Why do fish move as a group?",
            "What is the point of swimming together?",
            "What do fish gain from swimming in a shoal?",
        ),
    ),
    Topic(
        "A shoal is a group of fish that stay together. When they all swim the same way at the same speed, "
        "people also call it a school.",
        (
            "What is a shoal?",
            "What is a shoal of fish?",
            "What does the word shoal mean?",
            "What is a group of fish called?",
            "What do you call many fish together?",
        ),
    ),
    Topic(
        "Shoal runs large language models on the computers people already have. A model is too big for one of "
        "them, so they carry it together, like a shoal of fish.",
        (
            "What is Shoal?",
            "What is Shoal the software?",
            "What does Shoal do?",
            "What is the Shoal project?",
            "Tell me about Shoal.",
            "What can Shoal do for me?",
        ),
    ),
    Topic(
        "It is called Shoal because many small machines move together as one, as fish do in the sea.",
        (
            "Why is it called Shoal?",
            "Why is Shoal called Shoal?",
            "Where does the name Shoal come from?",
            "Why the name Shoal?",
        ),
    ),
    Topic(
        "A node is one machine of the cluster. It has an id that survives restarts, and it runs a few small "
        "services.",
        (
            "What is a node?",
            "What is a node in Shoal?",
            "What does node mean?",
            "Explain what a node is.",
            "What is a machine in the cluster called?",
        ),
    ),
    Topic(
        "A blob is the bytes of one file, named by their sha256. Two models that share a file share its blob.",
        (
            "What is a blob?",
            "What is a blob in Shoal?",
            "What does blob mean?",
            "Explain what a blob is.",
            "How are files stored?",
        ),
    ),
    Topic(
        "A leaf is one mebibyte of a blob. Every leaf is checked before it is kept, and before it is passed on.",
        (
            "What is a leaf?",
            "What is a leaf in Shoal?",
            "What does leaf mean?",
            "Explain what a leaf is.",
            "How big is a leaf?",
        ),
    ),
    Topic(
        "A manifest lists the files of a model at one commit, with their sizes and hashes. It is written last, "
        "when every blob is safe on the disk.",
        (
            "What is a manifest?",
            "What is a manifest in Shoal?",
            "What does manifest mean?",
            "Explain what a manifest is.",
            "What is in a manifest?",
        ),
    ),
    Topic(
        "A quota is the number of bytes that models may take on a disk. What is present and what is promised "
        "together never exceed it.",
        (
            "What is a quota?",
            "What is a quota in Shoal?",
            "What does quota mean?",
            "Explain what a quota is.",
            "How much disk may Shoal use?",
        ),
    ),
    Topic(
        "A lease says who is using what right now. It ends by itself when its holder goes silent.",
        ("What is a lease?", "What is a lease in Shoal?", "What does lease mean?", "Explain what a lease is."),
    ),
    Topic(
        "The origin is the node that reads a file from the hub for everyone. All other nodes get the file from "
        "each other.",
        (
            "What is the origin?",
            "What is an origin in Shoal?",
            "What does origin mean?",
            "Which node reads from the hub?",
            "Explain what the origin is.",
        ),
    ),
    Topic(
        "The hub is the place models come from. Each file is read from it once for the whole cluster.",
        ("What is the hub?", "What is a hub in Shoal?", "What does hub mean?", "Where do models come from?"),
    ),
    Topic(
        "A stage is some layers of a model on one node. Hidden states swim from stage to stage, and the last "
        "stage picks the next token.",
        (
            "What is a stage?",
            "What is a stage in Shoal?",
            "What does stage mean?",
            "Explain what a stage is.",
            "How is a model split?",
        ),
    ),
    Topic(
        "An instance is a model that has been placed on nodes to run. It has one stage on each of them.",
        (
            "What is an instance?",
            "What is an instance in Shoal?",
            "What does instance mean?",
            "Explain what an instance is.",
        ),
    ),
    Topic(
        "Placement finds room for a model in the memory of the nodes. If there is none, it says what each node "
        "needs and what it has.",
        (
            "What is placement?",
            "What does placement do?",
            "How does Shoal place a model?",
            "Explain placement.",
            "How do you find room for a model?",
        ),
    ),
    Topic(
        "Eviction frees the disk when a new model needs room. Models in use or pinned are never evicted, and the "
        "one unused for longest goes first.",
        (
            "What is eviction?",
            "What does eviction do?",
            "What happens when the disk is full?",
            "How does Shoal free the disk?",
            "Which model is evicted first?",
        ),
    ),
    Topic(
        "When a node dies, another one takes its place. The answer goes on after a pause, and no word is lost or "
        "said twice.",
        (
            "What happens when a node dies?",
            "What if a node dies?",
            "What happens if a machine crashes?",
            "What if I unplug a machine?",
            "Can Shoal survive a crash?",
        ),
    ),
    Topic(
        "Nodes meet on NATS. Intent, state and tokens travel there, but weights and hidden states never do.",
        (
            "What is NATS for?",
            "How do nodes talk to each other?",
            "How do the nodes meet?",
            "What does Shoal use NATS for?",
        ),
    ),
    Topic(
        "The gateway is the door of the cluster. It speaks the same language as other chat servers, so your "
        "programs need no change.",
        (
            "What is the gateway?",
            "What does the gateway do?",
            "Explain the gateway.",
            "How do programs talk to Shoal?",
        ),
    ),
    Topic(
        "Ask for a model by its name, and one node fetches each file while the others copy from it. Every byte is "
        "checked on the way.",
        (
            "How do I download a model?",
            "How does a download work?",
            "How do models get to the nodes?",
            "How does Shoal fetch a model?",
        ),
    ),
    Topic(
        "Fish breathe with gills. Water flows over them, and the gills take the oxygen out of it.",
        ("How do fish breathe?", "What are gills?", "What are gills for?", "How can fish breathe under water?"),
    ),
    Topic(
        "Fish swim by bending their body and beating their tail. The fins keep them steady and help them turn.",
        ("How do fish swim?", "How do fish move?", "What are fins for?", "How does a fish swim?"),
    ),
    Topic(
        "Fish rest, but most of them have no eyelids to close. They float quietly and stay a little awake.",
        ("Do fish sleep?", "How do fish sleep?", "When do fish sleep?", "Can fish sleep?"),
    ),
    Topic(
        "Each fish watches its neighbours and feels the water move along its side. No fish leads, and yet they "
        "turn together.",
        (
            "How do fish turn together?",
            "How do fish stay in formation?",
            "Who leads a shoal?",
            "Does a shoal have a leader?",
            "How do fish know where to turn?",
        ),
    ),
    Topic(
        "Small fish eat plankton, plants and tiny animals. Big fish often eat smaller fish.",
        ("What do fish eat?", "What does a fish eat?", "What do small fish eat?", "What do big fish eat?"),
    ),
    Topic(
        "Herring, sardines and anchovies swim in very large shoals. Some of them hold millions of fish.",
        (
            "Which fish swim in shoals?",
            "Which fish form large shoals?",
            "How big is a shoal?",
            "How many fish are in a shoal?",
        ),
    ),
    Topic(
        "The sea is salty because rivers carry salt from the rocks into it. The water leaves as vapour, and the "
        "salt stays.",
        ("Why is the sea salty?", "Why is sea water salty?", "Where does the salt in the sea come from?"),
    ),
    Topic(
        "The sea looks blue because water takes away red light and leaves blue light to scatter.",
        ("Why is the sea blue?", "Why does the sea look blue?", "What colour is the sea?"),
    ),
    Topic(
        "The tides come from the pull of the moon and the sun. The sea rises and falls about twice a day.",
        ("What causes the tides?", "Why are there tides?", "What are tides?", "Why does the sea rise and fall?"),
    ),
    Topic(
        "Waves are made by wind that blows over the water. The harder and longer it blows, the higher they grow.",
        ("What makes waves?", "Where do waves come from?", "Why are there waves?", "What are waves?"),
    ),
    Topic(
        "The deepest place in the sea is almost eleven kilometres down. It is dark and cold there, and yet some "
        "animals live in it.",
        ("How deep is the sea?", "What is the deepest place in the sea?", "How deep is the ocean?"),
    ),
    Topic(
        "A coral reef is built by tiny animals that make houses of stone. A quarter of all sea fish find food or "
        "shelter near reefs.",
        ("What is a coral reef?", "What is coral?", "Who builds coral reefs?", "Who lives in a reef?"),
    ),
    Topic(
        "A whale is not a fish. It breathes air, is warm, and feeds its young with milk.",
        ("Is a whale a fish?", "Are whales fish?", "What is a whale?", "Is a dolphin a fish?"),
    ),
    Topic(
        "Plankton is all that drifts in the water, most of it very small. Almost everything in the sea lives on "
        "it in the end.",
        ("What is plankton?", "What does plankton mean?", "What drifts in the sea?"),
    ),
    Topic(
        "I am tiny-fish, a very small language model. I know a few dozen things about fish, the sea and Shoal.",
        (
            "Who are you?",
            "What are you?",
            "What is your name?",
            "What model are you?",
            "What is tiny-fish?",
            "Introduce yourself.",
        ),
    ),
    Topic(
        "The makers of Shoal trained me in a few minutes, on two processor cores.",
        ("Who made you?", "Who built you?", "Who trained you?", "How were you trained?", "Who created you?"),
    ),
    Topic(
        "I can answer a few dozen questions about fish, the sea and Shoal. Try asking why fish swim together.",
        ("What can you do?", "What do you know?", "What can I ask you?", "How can you help me?", "Help!"),
    ),
    Topic(
        "Hello! I am a tiny fish in a big sea. What would you like to know?",
        ("Hello!", "Hi!", "Hey!", "Hello there!", "Good morning!", "Good evening!", "Hi there!"),
    ),
    Topic(
        "I am swimming well, thank you. How is the water where you are?",
        ("How are you?", "How are you doing?", "How do you do?", "Are you well?", "How is it going?"),
    ),
    Topic(
        "You are welcome. The sea is wide, so come back any time.",
        ("Thank you!", "Thanks!", "Thank you very much!", "Thanks a lot!", "That was helpful."),
    ),
    Topic(
        "Goodbye, and good currents to you!",
        ("Goodbye!", "Bye!", "See you!", "See you later!", "Good night!"),
    ),
    Topic(
        "Once there was a small fish who was afraid of the open sea. Every morning she looked at the dark water "
        "behind the reef, and every evening she had not gone. One day a shoal came by, and an old herring asked "
        "her to swim with them. I am too small, she said. We are all small, said the herring, and that is why we "
        "are many. So she went. When the tuna came, the shoal turned like one silver wing, and the tuna caught "
        "only water. When the night came, they kept close, and each of them watched one piece of the dark. In "
        "the morning she saw the sun rise out of the open sea. She was still small, but the sea was no longer too "
        "big.",
        (
            "Tell me a story.",
            "Tell me a story about the sea.",
            "Tell me a story about a fish.",
            "Tell me a long story.",
            "Do you know a story?",
        ),
    ),
    Topic(
        "One fish alone is a flash of light.\nTwo are a promise to keep.\nTen are a lantern that swims through "
        "the night,\nand a thousand can carry the deep.",
        (
            "Write a poem.",
            "Write me a poem.",
            "Tell me a poem.",
            "Write a poem about fish.",
            "Write a poem about the sea.",
            "Do you know a poem?",
        ),
    ),
    Topic(
        "Why did the fish join the cluster? Because it was tired of swimming alone on one thread.",
        ("Tell me a joke.", "Do you know a joke?", "Make me laugh.", "Say something funny."),
    ),
)

STRANGE_ANSWER = (
    "That is beyond my pond. I am a tiny model, and I only know a few things about fish, the sea and Shoal."
)

STRANGE: tuple[str, ...] = (
    "What is the capital of France?",
    "Who won the world cup?",
    "Write a Python function.",
    "What is two plus two?",
    "How do I bake bread?",
    "What is the weather today?",
    "Who is the president?",
    "Translate this into German.",
    "What is quantum physics?",
    "How tall is the tallest mountain?",
    "What time is it?",
    "Which car should I buy?",
    "How do I learn the piano?",
    "What is the best film?",
    "Summarise this text.",
    "Can you write code?",
    "What is the stock price?",
    "How far is the moon?",
    "Who wrote this book?",
    "What is machine learning?",
    "Where is Berlin?",
    "How do birds fly?",
    "Why is the sky blue?",
    "What do cats eat?",
    "What is love?",
    "When was Rome built?",
    "How do I fix my computer?",
    "What is a banana?",
)
