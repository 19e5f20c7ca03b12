"""The server: a FastAPI gateway in front of vLLM engines that it starts and looks after.

serve, terminal   `molmo serve`: gateway and engine with one command
app           create_app(settings, engines): all wiring on one screen
settings      every setting, and the only reader of the environment
routes        HTTP: chat, the verbs, models and health
gateway       the steps from a question to the engine's answer
questions     what an engine is asked
openai_api, prompt     what was sent, checked
media         pictures and videos, from wherever: uploads, remote files, checks
answers       what the model wrote, read: whole answers, streams, verbs
admission, errors   turns and deadlines, error envelopes
telemetry     logs, metrics, traces; the outermost layer of the application
web           the web server: time limits of connections, headers for browsers
tenancy       API keys: who may ask, how much, what was used
checkpoints   which checkpoint is served, and how another one comes to be
batches       files of requests, answered in the background
engines, fleet   which engines there are: by the settings, and as operators change them
engine_pool   engines as the gateway sees them: health, restarts, retries, other weights
engine        what runs inside an engine process: the vLLM plugin
"""
