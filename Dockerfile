# auditgap with what an audit needs; on a CPU, or with CUDA:
#
#     docker build -t auditgap .
#     docker build -t auditgap:cuda --build-arg TORCH=cuda .
#     docker run --rm -v "$PWD/runs:/audits/runs" auditgap demo
FROM python:3.12-slim

# torch's wheels of PyPI bring CUDA; those of the CPU index are a tenth of the size
ARG TORCH=cpu
ARG EXTRAS=ray,peft,gguf,hub,openai

WORKDIR /src
COPY . .
RUN if [ "$TORCH" = cpu ]; then index="--extra-index-url https://download.pytorch.org/whl/cpu"; fi \
    && pip install --no-cache-dir $index -c constraints.txt torch \
    && pip install --no-cache-dir -c constraints.txt ".[$EXTRAS]" \
    && auditgap setup --yes \
    && rm -rf /src/*

RUN useradd --create-home auditor && mkdir /audits && chown auditor /audits
USER auditor
WORKDIR /audits
ENV TOKENIZERS_PARALLELISM=false
ENTRYPOINT ["auditgap"]
CMD ["--help"]
