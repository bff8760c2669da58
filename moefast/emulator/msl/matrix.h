// Matrices of Cols columns, each a vector of Rows components: float2x3 has two of three.
namespace metal {

template <typename T, int Cols, int Rows = Cols>
struct matrix {
  static_assert(is_floating_point_v<T>, "the elements of a matrix are half, bfloat or float");
  static_assert(Cols >= 2 && Cols <= 4 && Rows >= 2 && Rows <= 4, "a matrix is 2x2 to 4x4");
  typedef vec<T, Rows> msl_column;
  msl_column columns[Cols];

  matrix() = default;
  MSL_COPIES(matrix)
  explicit matrix(T diagonal) {
    for (int c = 0; c < Cols; c++)
      for (int r = 0; r < Rows; r++)
        columns[c][r] = c == r ? diagonal : (T)0;
  }
  matrix(msl_column a, msl_column b) {
    static_assert(Cols == 2, "a matrix takes one vector for each column");
    columns[0] = a;
    columns[1] = b;
  }
  matrix(msl_column a, msl_column b, msl_column c) {
    static_assert(Cols == 3, "a matrix takes one vector for each column");
    columns[0] = a;
    columns[1] = b;
    columns[2] = c;
  }
  matrix(msl_column a, msl_column b, msl_column c, msl_column d) {
    static_assert(Cols == 4, "a matrix takes one vector for each column");
    columns[0] = a;
    columns[1] = b;
    columns[2] = c;
    columns[3] = d;
  }
  // Column by column.
  template <typename... A,
            typename =
                enable_if_t<sizeof...(A) == Cols * Rows && conjunction<is_arithmetic<A>...>::value>>
  matrix(A... a) {
    T given[] = {(T)a...};
    for (int i = 0; i < Cols * Rows; i++)
      columns[i / Rows][i % Rows] = given[i];
  }
  template <typename U, typename = enable_if_t<!is_same_v<T, U>>>
  explicit matrix(matrix<U, Cols, Rows> other) {
    for (int c = 0; c < Cols; c++)
      columns[c] = msl_make<msl_column>(other.columns[c]);
  }
#define MSL_COLUMN(SPACE)                                 \
  SPACE msl_column& operator[](int c) SPACE {             \
    return columns[c];                                    \
  }                                                       \
  const SPACE msl_column& operator[](int c) const SPACE { \
    return columns[c];                                    \
  }
  MSL_COLUMN()
  MSL_COLUMN(thread)
  MSL_COLUMN(device)
  MSL_COLUMN(threadgroup)
#undef MSL_COLUMN
  const constant msl_column& operator[](int c) const constant { return columns[c]; }
};

#define MSL_EACH_COLUMN(op)                                                              \
  template <typename T, int C, int R>                                                    \
  MSL_INLINE matrix<T, C, R> operator op(matrix<T, C, R> a, matrix<T, C, R> b) {         \
    for (int c = 0; c < C; c++)                                                          \
      a.columns[c] = a.columns[c] op b.columns[c];                                       \
    return a;                                                                            \
  }                                                                                      \
  template <typename T, int C, int R>                                                    \
  MSL_INLINE matrix<T, C, R>& operator op## = (matrix<T, C, R> & a, matrix<T, C, R> b) { \
    return a = a op b;                                                                   \
  }
MSL_EACH_COLUMN(+)
MSL_EACH_COLUMN(-)
#undef MSL_EACH_COLUMN
template <typename T, int C, int R>
MSL_INLINE matrix<T, C, R> operator-(matrix<T, C, R> a) {
  for (int c = 0; c < C; c++)
    a.columns[c] = -a.columns[c];
  return a;
}
template <typename T, int C, int R>
MSL_INLINE bool operator==(matrix<T, C, R> a, matrix<T, C, R> b) {
  bool equal = true;
  for (int c = 0; c < C; c++)
    equal = equal && all(a.columns[c] == b.columns[c]);
  return equal;
}
template <typename T, int C, int R>
MSL_INLINE bool operator!=(matrix<T, C, R> a, matrix<T, C, R> b) {
  return !(a == b);
}

template <typename T, int C, int R>
MSL_INLINE matrix<T, C, R> operator*(matrix<T, C, R> a, typename msl_same<T>::type s) {
  for (int c = 0; c < C; c++)
    a.columns[c] = a.columns[c] * s;
  return a;
}
template <typename T, int C, int R>
MSL_INLINE matrix<T, C, R> operator*(typename msl_same<T>::type s, matrix<T, C, R> a) {
  return a * s;
}
// Products are summed from the first column, or component, on, each fused into the sum.
template <typename T, int C, int R>
MSL_INLINE vec<T, R> operator*(matrix<T, C, R> a, vec<T, C> v) {
  vec<T, R> sum = a.columns[0] * (T)v[0];
  for (int c = 1; c < C; c++)
    sum = a.columns[c] * (T)v[c] + sum;
  return sum;
}
template <typename T, int C, int R>
MSL_INLINE vec<T, C> operator*(vec<T, R> v, matrix<T, C, R> a) {
  vec<T, C> r;
  for (int c = 0; c < C; c++)
    r[c] = dot(v, a.columns[c]);
  return r;
}
template <typename T, int C, int K, int R>
MSL_INLINE matrix<T, C, R> operator*(matrix<T, K, R> a, matrix<T, C, K> b) {
  matrix<T, C, R> r;
  for (int c = 0; c < C; c++)
    r.columns[c] = a * b.columns[c];
  return r;
}
template <typename T, int C, int R>
MSL_INLINE matrix<T, C, R>& operator*=(matrix<T, C, R>& a, typename msl_same<T>::type s) {
  return a = a * s;
}
template <typename T, int C, int R>
MSL_INLINE matrix<T, C, R>& operator*=(matrix<T, C, R>& a, matrix<T, C, C> b) {
  return a = a * b;
}

template <typename T, int C, int R>
MSL_INLINE matrix<T, R, C> transpose(matrix<T, C, R> a) {
  matrix<T, R, C> t;
  for (int c = 0; c < C; c++)
    for (int r = 0; r < R; r++)
      t.columns[r][c] = a.columns[c][r];
  return t;
}
template <typename T>
MSL_INLINE T determinant(matrix<T, 2, 2> a) {
  return a.columns[0][0] * a.columns[1][1] - a.columns[1][0] * a.columns[0][1];
}
template <typename T>
MSL_INLINE T determinant(matrix<T, 3, 3> a) {
  return dot(a.columns[0], cross(a.columns[1], a.columns[2]));
}
template <typename T>
MSL_INLINE T determinant(matrix<T, 4, 4> a) {
  T sum = (T)0;
  for (int c = 0; c < 4; c++) {  // along the first row
    matrix<T, 3, 3> minor;
    for (int k = 0; k < 3; k++)
      minor.columns[k] = a.columns[k + (k >= c)].yzw;
    T term = a.columns[c][0] * determinant(minor);
    sum = c % 2 ? sum - term : sum + term;
  }
  return sum;
}

#define MSL_MATRICES(T)           \
  typedef matrix<T, 2, 2> T##2x2; \
  typedef matrix<T, 2, 3> T##2x3; \
  typedef matrix<T, 2, 4> T##2x4; \
  typedef matrix<T, 3, 2> T##3x2; \
  typedef matrix<T, 3, 3> T##3x3; \
  typedef matrix<T, 3, 4> T##3x4; \
  typedef matrix<T, 4, 2> T##4x2; \
  typedef matrix<T, 4, 3> T##4x3; \
  typedef matrix<T, 4, 4> T##4x4;
MSL_MATRICES(float)
MSL_MATRICES(half)
#undef MSL_MATRICES
}  // namespace metal
