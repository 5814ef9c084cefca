"""One small file a model family, found by itself: it defines FAMILY, a megalora.models.family.Family."""
