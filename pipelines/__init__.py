"""One loadable file for each family: `DiffusionPipeline.from_pretrained(repo, custom_pipeline="pipelines/<family>.py")`."""
