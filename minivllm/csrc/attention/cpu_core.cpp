// Attention on the CPU for packed and paged keys alike: what is computed by whom, and where rows lie in memory.
// A row is one query of one head. The rows that share a key-value head are flattened (query major), cut into tiles of
// kTileRows, and every tile walks over its keys in tiles of kTileKeys: keys are widened to float32 and transposed once for
// all rows of the tile, so that scores are vectors along the keys. The keys are cut into splits of kSplitKeys at fixed
// positions, each with a state of its own, merged in order. So a row's bits depend on its own query and the keys and values
// it sees alone: not on other rows, not on how a prompt is cut into chunks, not on the number of threads; and a split may
// run on any thread.
#include "attention/cpu_core.h"

#include "attention/cpu_tiles.h"
#include "common/cpu.h"

#include <atomic>
#include <memory>
#include <type_traits>

namespace minivllm::attention {
namespace {

constexpr int64_t kTileKeys = 64;    // with head_dim 64 a tile of keys and one of values take 32 KiB, an L1 cache
constexpr int64_t kTileRows = 64;    // more reuse a tile of keys better, fewer waste less beyond the causal diagonal
constexpr int64_t kFewRows = 8;      // up to so many rows a tile is limited by memory, beyond by arithmetic
constexpr int64_t kCacheLine = 64;   // bytes
constexpr int64_t kNear = 1 << 20;   // bytes of keys and values that may still be cached when the model's next step comes
constexpr int64_t kSplitKeys = 512;  // a few microseconds of work for a decode row: the least that is worth another thread

// Address of row j of one sequence and head.
template <typename T>
struct KvRows {
  const T* head;
  const Side& side;
  const Sequence& sequence;
  int shift;

  KvRows(const Side& side, const Sequence& sequence, int64_t kv_head, int shift)
      : head(static_cast<const T*>(side.data) + kv_head * side.head_stride), side(side), sequence(sequence), shift(shift) {}

  const T* operator()(int64_t j) const {
    if (sequence.table == nullptr) return head + (sequence.kv_begin + j) * side.row_stride;
    const int64_t block = sequence.table[j >> shift], offset = j & ((int64_t{1} << shift) - 1);
    return head + block * side.block_stride + offset * side.row_stride;
  }
};

// Rows [row_begin, row_begin + rows) of one sequence and key-value head, and the keys [key_begin, key_end) that any of them
// sees; key_begin is rounded down to a tile of keys, so that tiles and splits lie where they lie without a window.
struct Tile {
  const Sequence* sequence;
  int64_t kv_head, row_begin, rows, key_begin, key_end;
  int64_t first_split() const { return key_begin / kSplitKeys; }
  int64_t end_split() const { return (key_end + kSplitKeys - 1) / kSplitKeys; }
};

const float* widened(const float* row, float*, int64_t) { return row; }
template <typename T>
const float* widened(const T* row, float* buffer, int64_t n) {
  to_float(row, buffer, n);
  return buffer;
}

// One thread's scratch memory and the work on one tile.
template <typename T>
class Worker {
 public:
  // max_rows: of any tile.
  Worker(const Call& call, int64_t max_rows)
      : call_(call), width_(round_up(call.head_dim, kLanes)), memory_(new float[size(max_rows, width_) + kLanes]),
        keys_(aligned(memory_.get())), wide_(keys_ + width_ * kTileKeys), q_(wide_ + kTileKeys * width_),
        scores_(q_ + max_rows * width_), split_(scores_ + max_rows * kTileKeys, max_rows, width_),
        total_(split_.out + RowStates::size(max_rows, width_), max_rows, width_) {}

  // All keys of a tile, to the output. `upcoming`: the tile that this worker takes next, or null.
  void run(const Tile& tile, const Tile* upcoming) {
    load_queries(tile);
    total_.clear(tile.rows);
    for (int64_t split = tile.first_split(); split < tile.end_split(); ++split) {
      run_split(tile, split, upcoming, split_);
      merge(tile, split, split_);
    }
    write(tile);
  }

  // One split of a tile, to a state that `finish` reads.
  void run_split_alone(const Tile& tile, int64_t split, RowStates states) {
    load_queries(tile);
    run_split(tile, split, nullptr, states);
  }

  // Merges the splits of a tile in order, to the output. states(split) are those of `run_split_alone`.
  template <typename States>
  void finish(const Tile& tile, const States& states) {
    find_visible(tile);
    total_.clear(tile.rows);
    for (int64_t split = tile.first_split(); split < tile.end_split(); ++split) merge(tile, split, states(split));
    write(tile);
  }

 private:
  const Call& call_;
  const int64_t width_;
  const std::unique_ptr<float[]> memory_;  // uninitialised: to fill it would cost more than a short decode row
  float *keys_, *wide_, *q_, *scores_;
  RowStates split_, total_;
  float keep_[kTileRows];
  int64_t first_visible_[kTileRows], visible_[kTileRows];

  static int64_t size(int64_t max_rows, int64_t width) {
    return 2 * kTileKeys * width + max_rows * (width + kTileKeys) + 2 * RowStates::size(max_rows, width);
  }

  static float* aligned(float* p) {
    const auto address = reinterpret_cast<uintptr_t>(p), step = kLanes * sizeof(float);
    return p + ((address + step - 1) / step * step - address) / sizeof(float);
  }

  int64_t token(const Tile& tile, int64_t r) const { return tile.sequence->q_begin + (tile.row_begin + r) / call_.group(); }
  int64_t head(const Tile& tile, int64_t r) const {
    return tile.kv_head * call_.group() + (tile.row_begin + r) % call_.group();
  }

  void find_visible(const Tile& tile) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t query = (tile.row_begin + r) / call_.group();
      first_visible_[r] = call_.first_visible(*tile.sequence, query);
      visible_[r] = call_.visible(*tile.sequence, query);
    }
  }

  // Rows before it see neither this key nor a later one; the last row of a tile sees its last key.
  int64_t first_row(int64_t key) const {
    int64_t first = 0;
    while (visible_[first] <= key) ++first;
    return first;
  }
  // Rows from it on see no key before this one.
  int64_t end_row(const Tile& tile, int64_t key) const {
    int64_t end = tile.rows;
    while (first_visible_[end - 1] >= key) --end;
    return end;
  }

  void load_queries(const Tile& tile) {
    find_visible(tile);
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t offset = token(tile, r) * call_.q_token_stride + head(tile, r) * call_.q_head_stride;
      const T* row = static_cast<const T*>(call_.q) + offset;
      float* wide = q_ + r * width_;
      to_float(row, wide, call_.head_dim);
#pragma omp simd
      for (int64_t d = 0; d < call_.head_dim; ++d) wide[d] *= call_.scale;
    }
  }

  void run_split(const Tile& tile, int64_t split, const Tile* upcoming, RowStates& states) {
    states.clear(tile.rows);
    const KvRows<T> keys(call_.k, *tile.sequence, tile.kv_head, call_.block_shift);
    const KvRows<T> values(call_.v, *tile.sequence, tile.kv_head, call_.block_shift);
    const int64_t end = std::min((split + 1) * kSplitKeys, tile.key_end);
    for (int64_t begin = std::max(split * kSplitKeys, tile.key_begin); begin < end; begin += kTileKeys)
      run_keys(tile, keys, values, begin, std::min(kTileKeys, end - begin), upcoming, states);
  }

  void run_keys(const Tile& tile, const KvRows<T>& keys, const KvRows<T>& values, int64_t begin, int64_t count,
                const Tile* upcoming, RowStates& states) {
    const int64_t next = begin + count, next_end = std::min(next + kTileKeys, tile.key_end);
    const int64_t first = first_row(begin), end = end_row(tile, next), rows = end - first, columns = round_up(count, kLanes);
    load_keys(keys, begin, count);
    float* scores = scores_ + first * kTileKeys;
    const auto transposed = [this](int64_t d) { return keys_ + d * kTileKeys; };
    beside(tile, transposed, values, begin, next, [&](const auto& b) {
      multiply(q_ + first * width_, width_, b, call_.head_dim, scores, kTileKeys, nullptr, rows, columns);
    });
    if (call_.softcap > 0.0f) cap_scores(scores, rows * kTileKeys);
    for (int64_t r = first; r < end; ++r)
      keep_[r] = states.add_scores(r, scores_ + r * kTileKeys, std::max<int64_t>(first_visible_[r] - begin, 0),
                                   std::min(visible_[r] - begin, count), columns);
    const float* value_rows[kTileKeys];
    load_values(values, begin, count, value_rows);
    const auto value = [&](int64_t j) { return value_rows[j]; };
    const auto add_values = [&](const auto& b) {
      multiply(scores, kTileKeys, b, count, states.out + first * width_, width_, keep_ + first, rows, width_);
    };
    if (next < tile.key_end || upcoming == nullptr) return beside(tile, value, keys, next, next_end, add_values);
    const KvRows<T> first_keys(call_.k, *upcoming->sequence, upcoming->kv_head, call_.block_shift);
    const int64_t first_end = std::min(upcoming->key_begin + kTileKeys, upcoming->key_end);
    beside(tile, value, first_keys, upcoming->key_begin, first_end, add_values);
  }

  void cap_scores(float* scores, int64_t n) const {
    for (int64_t i = 0; i < n; ++i) scores[i] = call_.softcap * std::tanh(scores[i] / call_.softcap);
  }

  // compute(b), where step k of the product also asks memory for row begin + k < end of `soon`. Tiles of few rows wait for
  // memory; requests spread over the product keep it busy, while a burst of them would stop the core.
  template <typename B, typename F>
  void beside(const Tile& tile, const B& b, const KvRows<T>& soon, int64_t begin, int64_t end, const F& compute) const {
    if (!call_.far || tile.rows > kFewRows) return compute(b);
    const int64_t bytes = call_.head_dim * static_cast<int64_t>(sizeof(T));
    compute([&](int64_t k) {
      if (begin + k < end) {
        const char* row = reinterpret_cast<const char*>(soon(begin + k));
        for (int64_t line = 0; line < bytes; line += kCacheLine) __builtin_prefetch(row + line);
      }
      return b(k);
    });
  }

  // keys_[d][j] = row j; the last row fills up the columns to a whole vector.
  void load_keys(const KvRows<T>& keys, int64_t begin, int64_t count) {
    const float* rows[kTileKeys];
    for (int64_t j = 0; j < count; ++j) rows[j] = widened(keys(begin + j), wide_ + j * width_, call_.head_dim);
    const int64_t columns = round_up(count, std::max(kLanes, 8));
    for (int64_t j = count; j < columns; ++j) rows[j] = rows[count - 1];
    for (int64_t j = 0; j < columns; j += 8) transpose_8_rows(rows + j, call_.head_dim, keys_ + j, kTileKeys);
  }

  // Rows of whole float32 vectors are read where they lie; others are copied, so that no load goes past a row's end.
  void load_values(const KvRows<T>& values, int64_t begin, int64_t count, const float** rows) {
    const bool in_place = std::is_same_v<T, float> && call_.head_dim == width_;
    for (int64_t j = 0; j < count; ++j) {
      const T* row = values(begin + j);
      if (in_place) {
        rows[j] = reinterpret_cast<const float*>(row);
      } else {
        to_float(row, wide_ + j * width_, call_.head_dim);
        rows[j] = wide_ + j * width_;
      }
    }
  }

  void merge(const Tile& tile, int64_t split, const RowStates& states) {
    const int64_t end = end_row(tile, (split + 1) * kSplitKeys);
    for (int64_t r = first_row(split * kSplitKeys); r < end; ++r) total_.merge(r, states);
  }

  void write(const Tile& tile) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t row = token(tile, r) * call_.num_heads + head(tile, r);
      if (call_.lse != nullptr) call_.lse[row] = total_.log_sum(r);
      from_float(total_.finish(r), static_cast<T*>(call_.out) + row * call_.head_dim, call_.head_dim);
    }
  }
};

// All tiles, those with the most keys of a sequence first, so that threads end together.
std::vector<Tile> make_tiles(const Call& call) {
  std::vector<Tile> tiles;
  for (const Sequence& s : call.sequences) {
    const int64_t rows = s.len_q * call.group();
    for (int64_t t = (rows + kTileRows - 1) / kTileRows - 1; t >= 0; --t) {
      const int64_t begin = t * kTileRows, count = std::min(kTileRows, rows - begin);
      const int64_t key_begin = call.first_visible(s, begin / call.group()) / kTileKeys * kTileKeys;
      const int64_t key_end = call.visible(s, (begin + count - 1) / call.group());
      for (int64_t h = 0; h < call.num_kv_heads; ++h) tiles.push_back({&s, h, begin, count, key_begin, key_end});
    }
  }
  return tiles;
}

// How many threads the call is worth: about 10 microseconds of work for each.
int64_t useful_threads(const Call& call, const std::vector<Tile>& tiles) {
  constexpr int64_t kRowsForLoading = 4;  // to load a key costs about as much as four rows' work on it
  constexpr int64_t kWorkPerThread = 1 << 18;
  int64_t work = 0;
  for (const Tile& tile : tiles) work += (tile.key_end - tile.key_begin) * (tile.rows + kRowsForLoading) * call.head_dim;
  return std::clamp<int64_t>(work / kWorkPerThread, 1, torch::stable::get_num_threads());
}

// f(worker, item, upcoming) for every item, each taken by the next free thread, because items differ in cost; `upcoming` is the
// item that the same worker takes next, taken already so that its keys can be asked for, or -1.
template <typename T, typename F>
void run_items(const Call& call, int64_t max_rows, int64_t items, int64_t threads, const F& f) {
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    Worker<T> worker(call, max_rows);
    const auto take = [&] { return next.fetch_add(1, std::memory_order_relaxed); };
    for (int64_t item = take(), upcoming; item < items; item = upcoming) {
      upcoming = take();
      f(worker, item, upcoming < items ? upcoming : -1);
    }
  };
  threads = std::min(threads, items);
  if (threads > 1) torch::stable::parallel_for(0, threads, 1, work);
  else work(0, 1);
}

// Few tiles with many keys (decode of a few long sequences): the splits are shared out among the threads.
template <typename T>
void run_splits(const Call& call, const std::vector<Tile>& tiles, int64_t max_rows, int64_t threads) {
  std::vector<std::pair<int64_t, int64_t>> items;  // tile, split
  std::vector<int64_t> first_item;  // of a tile: the item of its split s is first_item + s
  for (size_t t = 0; t < tiles.size(); ++t) {
    first_item.push_back(static_cast<int64_t>(items.size()) - tiles[t].first_split());
    for (int64_t split = tiles[t].first_split(); split < tiles[t].end_split(); ++split) items.emplace_back(t, split);
  }
  const int64_t width = round_up(call.head_dim, kLanes), size = RowStates::size(max_rows, width);
  const std::unique_ptr<float[]> memory(new float[items.size() * size]);
  const auto states = [&](int64_t item) { return RowStates(memory.get() + item * size, max_rows, width); };
  run_items<T>(call, max_rows, static_cast<int64_t>(items.size()), threads, [&](Worker<T>& worker, int64_t item, int64_t) {
    worker.run_split_alone(tiles[items[item].first], items[item].second, states(item));
  });
  run_items<T>(call, max_rows, static_cast<int64_t>(tiles.size()), threads, [&](Worker<T>& worker, int64_t t, int64_t) {
    worker.finish(tiles[t], [&](int64_t split) { return states(first_item[t] + split); });
  });
}

template <typename T>
void run_typed(Call call) {
  constexpr int64_t kTilesPerThread = 4;  // with fewer, whole tiles leave threads idle at the end
  const std::vector<Tile> tiles = make_tiles(call);
  const int64_t threads = useful_threads(call, tiles);
  int64_t max_rows = 0, keys = 0;
  bool long_keys = false;
  for (const Tile& tile : tiles) {
    max_rows = std::max(max_rows, tile.rows);
    keys += tile.key_end - tile.key_begin;
    long_keys |= tile.end_split() - tile.first_split() > 1;
  }
  call.far = keys * call.head_dim * 2 * static_cast<int64_t>(sizeof(T)) > kNear;
  if (threads > 1 && long_keys && static_cast<int64_t>(tiles.size()) < kTilesPerThread * threads)
    run_splits<T>(call, tiles, max_rows, threads);
  else
    run_items<T>(call, max_rows, static_cast<int64_t>(tiles.size()), threads,
                 [&](Worker<T>& worker, int64_t t, int64_t upcoming) {
                   worker.run(tiles[t], upcoming < 0 ? nullptr : &tiles[upcoming]);
                 });
}

}  // namespace

void run(ScalarType dtype, Call call) {
  dispatch_float(dtype, [&](auto* tag) { run_typed<std::remove_pointer_t<decltype(tag)>>(std::move(call)); });
}

}  // namespace minivllm::attention
