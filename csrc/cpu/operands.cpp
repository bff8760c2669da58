#include "operands.h"

#include <algorithm>
#include <memory>
#include <vector>

namespace moefast {
namespace {

// Fewer values than this are prepared faster by one thread than handed out.
constexpr int64_t kWorthSharing = 16 << 10;

// Rows prepared for one layout: each of the source's on its own, or those of one operand in a pack.
struct Set {
  const Product* product;
  Format format;
  const int32_t* index;  // of a pack; NULL: by row
  int64_t count;         // of a pack
  uint8_t* data;
  int64_t stride;           // by row
  std::vector<char> state;  // by row: one of the states below; of a pack: one for all
};

enum State : char { kUnused, kWanted, kReady, kUnfit };

bool fits(const Set& set, const Operand& operand) {
  const Product &a = *set.product, &b = *operand.product;
  if (a.layout != b.layout || set.format.group != operand.matrix->format.group) {
    return false;
  }
  return a.by_row || (set.index == operand.index && set.count == operand.count);
}

// One piece of work: rows [begin, end) of a set by row, or a whole pack.
struct Piece {
  Set* set;
  int64_t begin;
  int64_t end;
};

class Preparation {
 public:
  Preparation(moefast_engine& engine, const Source& source) : engine_(engine), source_(source) {}

  void want(Operand& operand) {
    Set& set = set_of(operand);
    if (set.index == nullptr) {
      for (int64_t i = 0; i < operand.count; ++i) {
        char& state = set.state[operand.index[i]];
        state = state == kUnused ? char{kWanted} : state;
      }
    }
  }

  void run() {
    std::vector<Piece> pieces;
    int64_t values = 0;
    for (const auto& set : sets_) {
      values += add_pieces(*set, pieces);
    }
    const auto work = [&](int64_t item, int64_t, int) { prepare(pieces[item]); };
    if (values < kWorthSharing) {
      for (size_t i = 0; i < pieces.size(); ++i) {
        work(static_cast<int64_t>(i), -1, 0);
      }
    } else {
      engine_.pool.run(static_cast<int64_t>(pieces.size()), work);
    }
  }

  // False: a row did not fit; the operand has to be wanted again with another product.
  bool give(Operand& operand) {
    const Set& set = set_of(operand);
    if (set.index != nullptr) {
      auto* rows = engine_.scratch.take<const void*>(1);
      rows[0] = set.data;
      operand.rows = rows;
      return set.state[0] == kReady;
    }
    auto* rows = engine_.scratch.take<const void*>(operand.count);
    bool ready = true;
    for (int64_t i = 0; i < operand.count; ++i) {
      rows[i] = set.data + operand.index[i] * set.stride;
      ready = ready && set.state[operand.index[i]] == kReady;
    }
    operand.rows = rows;
    return ready;
  }

 private:
  Set& set_of(const Operand& operand) {
    for (const auto& set : sets_) {
      if (fits(*set, operand)) {
        return *set;
      }
    }
    const Product& product = *operand.product;
    const int64_t rows = product.by_row ? source_.count : operand.count;
    auto set = std::make_unique<Set>();
    set->product = &product;
    set->format = operand.matrix->format;
    set->index = product.by_row ? nullptr : operand.index;
    set->count = rows;
    set->stride = product.by_row ? product.prepared_bytes(set->format, source_.dims, 1) : 0;
    const int64_t bytes = product.by_row ? set->stride * rows
                                         : product.prepared_bytes(set->format, source_.dims, rows);
    set->data = engine_.scratch.take<uint8_t>(bytes);
    set->state.assign(product.by_row ? rows : 1, product.by_row ? kUnused : kWanted);
    sets_.push_back(std::move(set));
    return *sets_.back();
  }

  // Returns the number of values to prepare.
  int64_t add_pieces(Set& set, std::vector<Piece>& pieces) const {
    if (set.index != nullptr) {
      if (set.state[0] == kWanted) {
        pieces.push_back({&set, 0, 1});
        return set.count * source_.dims;
      }
      return 0;
    }
    const int64_t step = std::max<int64_t>(1, kWorthSharing / 4 / source_.dims);
    int64_t wanted = 0;
    for (int64_t begin = 0; begin < set.count; begin += step) {
      const int64_t end = std::min(begin + step, set.count);
      const auto here = std::count(set.state.begin() + begin, set.state.begin() + end, kWanted);
      if (here > 0) {
        pieces.push_back({&set, begin, end});
        wanted += here;
      }
    }
    return wanted * source_.dims;
  }

  void prepare(const Piece& piece) const {
    Set& set = *piece.set;
    if (set.index != nullptr) {
      std::vector<const void*> rows(static_cast<size_t>(set.count));
      for (int64_t i = 0; i < set.count; ++i) {
        rows[i] = source_.row(set.index[i]);
      }
      const bool ready = set.product->prepare(set.format, source_.dtype, rows.data(), set.count,
                                              source_.dims, set.data);
      set.state[0] = ready ? kReady : kUnfit;
      return;
    }
    for (int64_t i = piece.begin; i < piece.end; ++i) {
      if (set.state[i] == kWanted) {
        const void* row = source_.row(i);
        const bool ready = set.product->prepare(set.format, source_.dtype, &row, 1, source_.dims,
                                                set.data + i * set.stride);
        set.state[i] = ready ? kReady : kUnfit;
      }
    }
  }

  moefast_engine& engine_;
  const Source& source_;
  std::vector<std::unique_ptr<Set>> sets_;
};

void choose(const moefast_engine& engine, Precision precision, Operand& operand) {
  operand.product = find_product(engine.isa, operand.matrix->format, precision, operand.matrix->in,
                                 operand.count);
}

}  // namespace

void prepare(moefast_engine& engine,
             const Source& source,
             Precision precision,
             Operand* operands,
             int64_t count) {
  Preparation preparation(engine, source);
  for (int64_t i = 0; i < count; ++i) {
    choose(engine, precision, operands[i]);
    preparation.want(operands[i]);
  }
  preparation.run();
  bool unfit = false;
  for (int64_t i = 0; i < count; ++i) {
    if (!preparation.give(operands[i])) {
      choose(engine, kAnyValues, operands[i]);
      preparation.want(operands[i]);
      unfit = true;
    }
  }
  if (unfit) {
    preparation.run();
    for (int64_t i = 0; i < count; ++i) {
      preparation.give(operands[i]);
    }
  }
}

}  // namespace moefast
