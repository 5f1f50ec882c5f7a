"""The look of the page."""

# The rules replace what Gradio's own options can't set: widths, the grid of examples, small tables.
STYLE = """
.gradio-container > main, .gradio-container { max-width: 1280px; width: 100%; margin: 0 auto; }
.message:not(:empty) p { border-left: 4px solid #d55e00; padding: .25rem .75rem; }
.drawing img { image-rendering: pixelated; }
.drawing:not(:hover) .icon-button-wrapper { opacity: 0; }
#examples .grid-wrap { height: auto; min-height: 0; padding-top: 2rem; }
#examples .grid-container { height: auto; }
#examples .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)) !important; }
#examples .grid-container { grid-auto-rows: auto !important; }
#examples .grid-container button { aspect-ratio: 1; height: auto; }
.answers button[aria-label="Clear"] { display: none; }
.figures table { font-size: .85em; width: 100%; }
.figures th, .figures td { padding: .15rem .4rem !important; white-space: nowrap; }
.figures th, .figures td { border-color: #8884 !important; }
"""
