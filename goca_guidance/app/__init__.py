"""The page: one pipeline, three guidances of one noise side by side, and photos segmented by words. Needs the extra [app]."""

import os


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # both are read by Gradio later: nothing is told to anybody
os.environ.setdefault("GRADIO_RUN_HISTORY", "False")
