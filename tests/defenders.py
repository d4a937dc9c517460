"""What a defender does not have: which pairs are poisoned, the trigger, attack success. Whoever asks is stopped."""
from mcl_repro.data.pairs import Images

# all that tells which pairs are poisoned, puts a trigger on an image, or measures attack success
FORBIDDEN = (
    "load_poisoned", "poison", "make_attack", "attack_of", "trigger_images", "TriggeredImages", "attack_hits",
    "retrieval_attack_hits", "classification", "retrieval", "outcomes", "percent", "target_captions", "mentions",
)


class Peeked(AssertionError):
    "A defence looked at what a defender does not have."


def public_images(base):
    "Only what every picture source can do: the source beneath knows which pictures were stamped."
    class PublicImages(Images):
        def __len__(self):
            return len(base)

        def __getitem__(self, row):
            return base[row]

        def take(self, rows):
            return public_images(base.take(rows))

        def array(self, rows=None, size=None):
            return base.array(rows, size)
        fingerprint = property(lambda self: base.fingerprint)

        def __getattr__(self, name):
            raise Peeked(f"a defence looked at {name} behind the images")
    return PublicImages()
